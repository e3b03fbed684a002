"""Tests that the thread writing rows passes requests on to traces, and that failures stay separate."""

from collections import Counter
from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from serving.protocols.route import Route
from serving.telemetry import request_log
from serving.telemetry.content import Content
from serving.telemetry.request_log import RequestLog
from serving.telemetry.traces.request_trace import RequestTrace
from svc.settings.monitoring import RequestLogSettings
from svc.store.requests import Dropped, RequestRecord
from svc.store.tables import RequestRow
from tests.builders.requests import RECORD as OLD_RECORD

RECORD = OLD_RECORD._replace(started_at=datetime.now(UTC))
TRACE = RequestTrace(1, 2, None, "", True)


class Sink:
    """Collects the spans passed to it.

    Attributes:
        broken: whether it fails on every span.
    """

    def __init__(self) -> None:
        self.given: list[tuple[RequestTrace, RequestRecord]] = []
        self.dropped = 0
        self.broken = False

    def add(self, trace: RequestTrace, record: RequestRecord) -> None:
        if self.broken:
            raise ZeroDivisionError
        self.given.append((trace, record))

    def drop(self) -> None:
        self.dropped += 1


class Pen:
    """A request log with a span sink."""

    def __init__(self, store: Store, max_queued: int = 100) -> None:
        self.store = store
        self.sink = Sink()
        self.dropped = Counter[Dropped]()
        self.log = RequestLog(
            store,
            RequestLogSettings(content_share=1.0),
            on_stored=lambda count: None,
            on_dropped=lambda reason, count: self.dropped.update({reason: count}),
            spans=self.sink,
            max_queued=max_queued,
        )

    def rows(self) -> int:
        with Session(self.store) as session:
            return session.scalar(select(func.count()).select_from(RequestRow)) or 0


@pytest.fixture
def pen(store: Store) -> Pen:
    return Pen(store)


def test_traced_request_is_exported_with_redacted_content(pen: Pen) -> None:
    content = Content(Route.CHAT_COMPLETIONS, b'{"messages": [{"role": "user", "content": "I am a@b.de"}]}')
    content.add(b'{"choices": [{"index": 0, "message": {"content": "call 030 901820"}}]}')
    pen.log.add(RECORD, content, TRACE)
    pen.log.start()
    pen.log.close()
    [(trace, record)] = pen.sink.given
    assert trace is TRACE
    assert record == RECORD._replace(prompt='[{"role": "user", "content": "I am [mail]"}]', answer="call [phone]")


def test_untraced_request_is_stored_as_a_row_without_a_span(pen: Pen) -> None:
    pen.log.add(RECORD)
    pen.log.start()
    pen.log.close()
    assert (pen.rows(), pen.sink.given) == (1, [])


def test_span_is_sent_even_if_the_store_rejects_the_rows(pen: Pen, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(request_log, "add_requests", full)
    pen.log.add(RECORD, trace=TRACE)
    pen.log.start()
    pen.log.close()
    assert (pen.dropped[Dropped.STORE_FAILED], len(pen.sink.given)) == (1, 1)


def test_request_row_is_written_even_if_its_trace_span_fails(pen: Pen) -> None:
    pen.sink.broken = True
    pen.log.add(RECORD, trace=TRACE)
    pen.log.add(RECORD._replace(request_id="req-2"), trace=TRACE)
    pen.log.start()
    pen.log.close()
    assert (pen.rows(), pen.sink.dropped) == (2, 2)


def test_span_is_dropped_and_counted_if_the_queue_is_full(store: Store) -> None:
    pen = Pen(store, max_queued=1)
    for trace in (TRACE, TRACE, None):
        pen.log.add(RECORD, trace=trace)
    assert (pen.dropped[Dropped.QUEUE_FULL], pen.sink.dropped) == (2, 1)
