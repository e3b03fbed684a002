"""Tests sending spans: the limits of the queue, and what happens to spans beyond them."""

import logging
import string
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from serving.telemetry.traces import traces as module
from serving.telemetry.traces.request_trace import SpanDropped
from serving.telemetry.traces.traces import Tracer, Traces
from svc.identity.key_secret import new_secret
from svc.store.requests import RequestOutcome, RequestRecord
from svc.version import Format, VersionId

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACER = Tracer(1.0)
Headers = list[tuple[bytes, bytes]]


class GatedExporter(SpanExporter):
    """An exporter that accepts batches only while its gate is open.

    Attributes:
        gate: event that the exporter waits for.
        taken: names and attributes of all exported spans.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.asked = threading.Event()
        self.taken: list[ReadableSpan] = []
        self.batches: list[int] = []
        self.result = SpanExportResult.SUCCESS
        self.ends = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked.set()
        self.gate.wait(30)
        self.taken += spans
        self.batches.append(len(spans))
        return self.result

    def shutdown(self) -> None:
        self.ends += 1


class Sent:
    """Traces that send to a gated exporter, together with their reports."""

    def __init__(self, **limits: int) -> None:
        self.exporter = GatedExporter()
        self.counts = Counter[str]()
        self.traces = Traces(
            self.exporter,
            sample_share=1.0,
            release="1",
            on_sent=lambda count: self.counts.update(sent=count),
            on_dropped=lambda reason, count: self.counts.update({reason.value: count}),
            **limits,
        )

    def add(self, prompt: str | None = None) -> None:
        trace = self.traces.begin([])
        trace.end(model="tuned", stream=False, queue_s=0.0, overhead_s=0.001)
        self.traces.add(
            trace,
            RequestRecord(
                request_id="req-1",
                started_at=datetime.now(UTC),
                model="tuned",
                version=VersionId("tuned", 1),
                format=Format.MERGED,
                route="/v1/chat/completions",
                status=200,
                seconds=0.1,
                prompt=prompt,
                answer=None if prompt is None else "",
                outcome=RequestOutcome.COMPLETE,
            ),
        )


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY_MS", 5)


def test_queued_spans_are_sent_on_close() -> None:
    sent = Sent()
    sent.exporter.gate.set()
    for _ in range(200):
        sent.add()
    sent.traces.close()
    assert sent.counts == {"sent": 200}
    assert max(sent.exporter.batches) <= module._BATCH
    assert sent.exporter.ends == 1


def test_spans_beyond_the_queue_capacity_are_dropped_and_counted() -> None:
    sent = Sent(max_queued=10)
    for _ in range(25):
        sent.add()
    assert sent.counts == {SpanDropped.QUEUE_FULL: 15}
    sent.exporter.gate.set()
    sent.traces.close()
    assert sent.counts == {SpanDropped.QUEUE_FULL: 15, "sent": 10}


def test_sending_spans_frees_space_in_the_span_queue() -> None:
    sent = Sent(max_queued=1)
    sent.exporter.gate.set()
    for number in range(1, 4):
        sent.add()
        _until_told(sent, "sent", number)
    sent.traces.close()
    assert sent.counts == {"sent": 3}


def test_span_is_sent_without_content_when_the_content_limit_is_exceeded() -> None:
    sent = Sent(max_content=500)
    sent.add('"' + "x" * 300 + '"')
    sent.add('"' + "y" * 300 + '"')
    sent.exporter.gate.set()
    sent.traces.close()
    assert sent.counts == {SpanDropped.CONTENT_LIMIT: 1, "sent": 2}
    has = ["gen_ai.input.messages" in (span.attributes or {}) for span in sent.exporter.taken]
    assert sorted(has) == [False, True]


def test_sent_spans_no_longer_count_towards_the_content_limit() -> None:
    sent = Sent(max_content=500)
    sent.exporter.gate.set()
    for number in range(1, 4):
        sent.add('"' + "x" * 300 + '"')
        _until_told(sent, "sent", number)
    sent.traces.close()
    assert sent.counts == {"sent": 3}


def test_all_memory_is_released_after_the_opentelemetry_sdk_truncates_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "20")
    sent = Sent(max_content=500)
    sent.exporter.gate.set()
    for number in range(1, 4):
        sent.add('"' + "x" * 300 + '"')
        _until_told(sent, "sent", number)
    sent.traces.close()
    assert sent.counts == {"sent": 3}
    assert [len(str((span.attributes or {})["gen_ai.input.messages"])) for span in sent.exporter.taken] == [20] * 3


def test_rejected_span_batch_is_counted_and_released() -> None:
    sent = Sent(max_queued=1)
    sent.exporter.result = SpanExportResult.FAILURE
    sent.exporter.gate.set()
    for number in (1, 2):
        sent.add()
        _until_told(sent, SpanDropped.SEND_FAILED, number)
    sent.traces.close()
    assert sent.counts == {SpanDropped.SEND_FAILED: 2}


def test_closing_the_trace_exporter_waits_no_longer_than_its_timeout() -> None:
    sent = Sent()
    sent.add()
    assert sent.exporter.asked.wait(5)
    began = time.monotonic()
    sent.traces.close(0.1)
    assert 0.1 <= time.monotonic() - began < 2
    assert sent.exporter.ends == 1
    sent.exporter.gate.set()


def test_adding_a_span_never_waits_for_the_receiver() -> None:
    sent = Sent()
    sent.add()
    assert sent.exporter.asked.wait(5)
    began = time.monotonic()
    for _ in range(100):
        sent.add()
    assert time.monotonic() - began < 2
    sent.exporter.gate.set()
    sent.traces.close()
    assert sent.counts == {"sent": 101}


def _until_told(sent: Sent, what: str, count: int) -> None:
    deadline = time.monotonic() + 5
    while sent.counts[what] != count:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def headers(*parents: str, state: str | None = None) -> Headers:
    given = [(b"host", b"localhost"), *((b"traceparent", parent.encode("latin-1")) for parent in parents)]
    return given if state is None else [*given, (b"tracestate", state.encode("latin-1"))]


def taken_over(*parents: str) -> bool:
    return TRACER.begin(headers(*parents)).parent_id is not None


def test_valid_traceparent_determines_the_trace_id_and_parent_id_and_sampling_flag_of_a_span() -> None:
    cases: list[str] = [
        f"00-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-00",
        f"00-{TRACE}-{PARENT}-03",
        f"01-{TRACE}-{PARENT}-01",
        f"cc-{TRACE}-{PARENT}-01-what-will-be",
    ]
    for parent in cases:
        place = TRACER.begin(headers(parent))
        assert (f"{place.trace_id:032x}", f"{place.parent_id:016x}") == (TRACE, PARENT), parent
        assert place.sampled is (not parent.endswith("-00")), parent


def test_malformed_traceparent_is_ignored() -> None:
    cases: list[str] = [
        "",
        "nonsense",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-01-more",
        f"ff-{TRACE}-{PARENT}-01",
        f"0-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE[:-1]}g-{PARENT}-01",
        f"cc-{TRACE}-{PARENT}-01" + "-x" * 100_000,
    ]
    for parent in cases:
        assert not taken_over(parent), parent


def test_duplicate_traceparent_headers_are_ignored() -> None:
    assert not taken_over(f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-01")


@given(st.text(st.characters(max_codepoint=255)), st.text(st.characters(max_codepoint=255)))
def test_trace_headers_for_the_engine_are_valid_regardless_of_client_headers(parent: str, state: str) -> None:
    for traceparent in (parent, f"00-{TRACE}-{PARENT}-01"):
        lines = TRACER.begin(headers(traceparent, state=state)).header_lines
        assert lines.endswith("\r\n")
        for line in lines.removesuffix("\r\n").split("\r\n"):
            assert line.split(": ")[0] in ("traceparent", "tracestate")
            assert {*line} <= {*string.printable} - {*"\r\n\x0b\x0c"}


def test_valid_tracestate_is_forwarded_with_its_traceparent() -> None:
    states: list[tuple[str | None, str]] = [
        ("a=1", "a=1"),
        ("a=1, b@c=2", "a=1,b@c=2"),
        (None, ""),
        ("a", ""),
        (",".join(f"k{number}=1" for number in range(33)), ""),
        ("a=" + "x" * 100_000, ""),
    ]
    for sent, forwarded in states:
        assert TRACER.begin(headers(f"00-{TRACE}-{PARENT}-01", state=sent)).state == forwarded, sent


def test_tracestate_without_a_traceparent_is_ignored() -> None:
    assert TRACER.begin(headers(state="a=1")).state == ""


def test_tracestate_containing_a_secret_is_dropped() -> None:
    assert (
        TRACER.begin(headers(f"00-{TRACE}-{PARENT}-01", state=f"a={new_secret('abcdefgh')}")).header_lines.count("\r\n")
        == 1
    )


def test_client_trace_headers_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for parent in ("x" * 100_000, f"00-{TRACE}-{PARENT}-01"):
        TRACER.begin(headers(parent, state="b" * 100_000))
        TRACER.begin(headers(parent, state="b=1,b=2,c"))
    assert caplog.records == []


def test_configured_share_of_traces_started_by_the_gateway_is_sampled() -> None:
    cases: list[tuple[float, int, int]] = [(0.0, 0, 0), (0.25, 400, 600), (1.0, 2000, 2000)]
    for share, least, most in cases:
        tracer = Tracer(share)
        assert least <= sum(tracer.begin(headers()).sampled for _ in range(2000)) <= most, share


def test_sampling_flag_in_the_traceparent_header_overrides_the_configured_sample_share() -> None:
    assert not Tracer(1.0).begin(headers(f"00-{TRACE}-{PARENT}-00")).sampled
    assert Tracer(0.0).begin(headers(f"00-{TRACE}-{PARENT}-01")).sampled


def test_trace_and_span_ids_are_unique() -> None:
    places = [TRACER.begin(headers()) for _ in range(1000)]
    assert len({place.trace_id for place in places}) == len({place.span_id for place in places}) == 1000


def test_span_duration_is_correct_even_if_the_clock_changes_during_the_span(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Mapping[str, int] = {"time.time_ns": 10**18}
    for name, value in times.items():
        monkeypatch.setattr(name, lambda value=value: value)
    place = TRACER.begin(headers())
    monkeypatch.setattr("time.time_ns", lambda: 0)
    place.end(model=None, stream=None, queue_s=0.0, overhead_s=None)
    assert 0 <= place.ended_ns - place.started_ns < 10**9
