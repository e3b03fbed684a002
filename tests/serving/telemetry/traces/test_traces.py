"""Spans on their way out: how many may wait, and what becomes of those that may not."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from serving.telemetry.traces import traces as module
from serving.telemetry.traces.request_trace import SpanDropped
from serving.telemetry.traces.traces import Traces
from svc.store.requests import Outcome, RequestRecord
from svc.version import Format, VersionId


class GatedExporter(SpanExporter):
    """Takes batches once it may.

    Attributes:
        gate: it waits for it.
        taken: names and attributes of all spans.
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
    """Traces to a gated exporter, and what they tell."""

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
                outcome=Outcome.COMPLETE,
            ),
        )


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY_MS", 5)


def test_what_waits_is_sent_at_the_end() -> None:
    sent = Sent()
    sent.exporter.gate.set()
    for _ in range(200):
        sent.add()
    sent.traces.close()
    assert sent.counts == {"sent": 200}
    assert max(sent.exporter.batches) <= module._BATCH
    assert sent.exporter.ends == 1


def test_beyond_the_queue_spans_are_dropped_and_counted() -> None:
    sent = Sent(max_queued=10)
    for _ in range(25):
        sent.add()
    assert sent.counts == {SpanDropped.QUEUE_FULL: 15}
    sent.exporter.gate.set()
    sent.traces.close()
    assert sent.counts == {SpanDropped.QUEUE_FULL: 15, "sent": 10}


def test_there_is_room_again_once_spans_were_sent() -> None:
    sent = Sent(max_queued=1)
    sent.exporter.gate.set()
    for number in range(1, 4):
        sent.add()
        _until_told(sent, "sent", number)
    sent.traces.close()
    assert sent.counts == {"sent": 3}


def test_content_beyond_its_limit_stays_here_and_the_span_is_sent() -> None:
    sent = Sent(max_content=500)
    sent.add('"' + "x" * 300 + '"')
    sent.add('"' + "y" * 300 + '"')
    sent.exporter.gate.set()
    sent.traces.close()
    assert sent.counts == {SpanDropped.CONTENT_LIMIT: 1, "sent": 2}
    has = ["gen_ai.input.messages" in (span.attributes or {}) for span in sent.exporter.taken]
    assert sorted(has) == [False, True]


def test_content_that_was_sent_takes_no_room() -> None:
    sent = Sent(max_content=500)
    sent.exporter.gate.set()
    for number in range(1, 4):
        sent.add('"' + "x" * 300 + '"')
        _until_told(sent, "sent", number)
    sent.traces.close()
    assert sent.counts == {"sent": 3}


def test_content_that_the_sdk_has_cut_gives_back_all_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "20")
    sent = Sent(max_content=500)
    sent.exporter.gate.set()
    for number in range(1, 4):
        sent.add('"' + "x" * 300 + '"')
        _until_told(sent, "sent", number)
    sent.traces.close()
    assert sent.counts == {"sent": 3}
    assert [len(str((span.attributes or {})["gen_ai.input.messages"])) for span in sent.exporter.taken] == [20] * 3


def test_a_batch_that_is_refused_is_counted_and_makes_room() -> None:
    sent = Sent(max_queued=1)
    sent.exporter.result = SpanExportResult.FAILURE
    sent.exporter.gate.set()
    for number in (1, 2):
        sent.add()
        _until_told(sent, SpanDropped.SEND_FAILED, number)
    sent.traces.close()
    assert sent.counts == {SpanDropped.SEND_FAILED: 2}


def test_the_end_waits_so_long_and_no_longer() -> None:
    sent = Sent()
    sent.add()
    assert sent.exporter.asked.wait(5)
    began = time.monotonic()
    sent.traces.close(0.1)
    assert 0.1 <= time.monotonic() - began < 2
    assert sent.exporter.ends == 1
    sent.exporter.gate.set()


def test_to_add_a_span_never_waits_for_the_receiver() -> None:
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
