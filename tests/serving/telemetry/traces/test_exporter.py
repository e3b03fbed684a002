"""Tests the configuration of the trace receiver and the log lines about it."""

import logging

import pytest

from serving.telemetry.traces.exporter import LogLimit, otlp_exporter, traces_url
from svc.errors import SettingsError

SECRET = "cHVibGljOnNlY3JldA"


def test_trace_url_is_derived_from_the_endpoint() -> None:
    cases: list[tuple[str, str]] = [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/api/public/otel", "https://c/api/public/otel/v1/traces"),
        ("http://p:6006/v1/traces", "http://p:6006/v1/traces"),
        ("http://p:6006/v1/traces/", "http://p:6006/v1/traces"),
    ]
    assert [given for given, used in cases if traces_url(given) != used] == []


MALFORMED = (
    f"authorization {SECRET}",
    f"a=b,{SECRET}",
    f'authorization="{SECRET}"',
    f"authorization={SECRET};x",
    f"authorization={SECRET}é",
    f"authorization={SECRET}%0Aa",
    f"authorization={SECRET}%C3%A9",
    f"auth orization={SECRET}",
    f"authorization={SECRET}\n",
)


@pytest.mark.parametrize("variable", ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"])
def test_malformed_trace_header_is_rejected_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, variable: str
) -> None:
    caplog.set_level(logging.DEBUG)
    for text in MALFORMED:
        monkeypatch.setenv(variable, text)
        with pytest.raises(SettingsError) as caught:
            otlp_exporter("http://127.0.0.1:1")
        assert variable in str(caught.value), text
        assert SECRET not in str(caught.value) + caplog.text, text


def test_trace_headers_accepted_by_the_sdk_are_accepted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cases: list[str] = [
        "",
        ",",
        f"authorization=Basic%20{SECRET}%3D%3D",
        f"authorization=Basic {SECRET}==, x-project = p",
        "a=",
    ]
    for text in cases:
        caplog.set_level(logging.DEBUG)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", text)
        otlp_exporter("http://127.0.0.1:1").shutdown()
        assert caplog.records == [], text


def test_export_errors_are_logged_at_most_once_per_minute() -> None:
    times = iter((0.0, 1.0, 59.9, 60.0, 60.1, 1000.0))
    limit = LogLimit(lambda: next(times))
    record = logging.LogRecord("a", logging.ERROR, "", 0, "down", None, None)
    assert [limit.filter(record) for _ in range(6)] == [True, False, False, True, False, True]
