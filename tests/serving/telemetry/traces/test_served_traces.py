"""Tests `svc serve` over TCP until it stops, with traces sent to a receiver over TCP, and without traces."""

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from serving.telemetry.traces.traces import Traces
from svc.settings.monitoring import RequestLogSettings, TelemetrySettings
from tests.command_line import Svc
from tests.serving.home import Home
from tests.serving.otlp_receiver import otlp_receiver
from tests.serving.versions import NAME

CHAT: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "one two three"}]}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "cHVibGljOnNlY3JldA"


def with_traces(home: Home, endpoint: str) -> None:
    update = {
        "telemetry": TelemetrySettings(otlp_endpoint=endpoint),
        "request_log": RequestLogSettings(content_share=1.0),
    }
    home.settings = home.settings.model_copy(update=update)


@pytest.mark.slow
async def test_server_sends_the_spans_of_its_requests_before_it_stops(home: Home) -> None:
    with otlp_receiver() as receiver:
        with_traces(home, receiver.url)
        async with home.serving(f"{NAME}@1") as client:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            answers = [
                await client.post("/v1/chat/completions", json={**CHAT, "stream": stream}, headers=headers)
                for stream in (False, True)
            ]
            page = (await client.get("/metrics")).text
    spans = {span.attributes["tuneserve.request.id"]: span for span in receiver.spans}
    for answer in answers:
        span = spans.pop(answer.headers["x-request-id"])
        assert (span.trace, span.parent) == (TRACE, PARENT)
        assert span.attributes["gen_ai.response.model"] == answer.headers["x-model-version"]
        assert json.loads(span.attributes["gen_ai.input.messages"])[0]["parts"][0]["content"] == "one two three"
    assert spans == {}
    assert "svc_spans_total" in page


@pytest.mark.slow
async def test_server_answers_requests_and_stops_normally_if_the_trace_receiver_is_down(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Traces.close, "__defaults__", (0.2,))  # seconds that a stop waits for the receiver
    with_traces(home, "http://127.0.0.1:1")
    async with asyncio.timeout(30), home.serving(f"{NAME}@1") as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


@pytest.mark.slow
async def test_status_and_metrics_do_not_show_the_trace_receiver_headers(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Basic%20{SECRET}")
    caplog.set_level("DEBUG")
    with otlp_receiver() as receiver:
        with_traces(home, receiver.url)
        async with home.serving(f"{NAME}@1") as client:
            await client.post("/v1/chat/completions", json=CHAT)
            pages = [(await client.get(path)).text for path in ("/svc/status", "/metrics", "/openapi.json")]
    assert receiver.heads[0]["authorization"] == f"Basic {SECRET}"
    assert SECRET not in "".join(pages) + caplog.text
    assert SECRET.encode() not in b"".join(receiver.bodies)


@pytest.mark.slow
def test_serve_command_rejects_malformed_otlp_headers_without_quoting_them(
    svc: Svc, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", SECRET)
    monkeypatch.setenv("SVC_TELEMETRY__OTLP_ENDPOINT", "http://127.0.0.1:1")
    ended = svc("--home", home.settings.home, "serve", NAME, "--port", "0")
    assert ended.code == 2
    assert "OTEL_EXPORTER_OTLP_HEADERS" in ended.err
    assert SECRET not in ended.out + ended.err


LOADED = """
import sys
import serving.server.server
from serving.server.assembly import make_traces
from svc.settings.monitoring import TelemetrySettings
assert make_traces(TelemetrySettings(), None) is None
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


@pytest.mark.slow
def test_opentelemetry_is_not_imported_if_no_trace_receiver_is_configured() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "[]\n"
