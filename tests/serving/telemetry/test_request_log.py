"""Tests that every request leaves a row, that no request waits for it, and that lost rows are counted."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from serving.protocols.route import Route
from serving.telemetry import request_log
from serving.telemetry.content import Content
from serving.telemetry.request_log import RequestLog
from svc.settings.monitoring import RequestLogSettings
from svc.store.feedback import Feedback, Rating, keep_feedback
from svc.store.requests import Dropped, Pruned, add_requests
from svc.store.tables import RequestRow
from tests.builders.requests import RECORD as OLD_RECORD
from tests.builders.statements import statements
from tests.postgresql import PostgresServer

RECORD = OLD_RECORD._replace(started_at=datetime.now(UTC))
CONTENT = b'{"messages": [{"role": "user", "content": "I am a@b.de"}]}'
ANSWER = b'{"choices": [{"index": 0, "message": {"content": "call 030 901820"}}]}'


class Pen:
    """A request log writer together with its reports."""

    def __init__(
        self,
        store: Store,
        max_queued: int = 100,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        **settings: object,
    ) -> None:
        self.store = store
        self.stored = 0
        self.dropped: Counter[Dropped] = Counter()
        self.writer = RequestLog(
            store,
            RequestLogSettings(**settings),
            on_stored=self._count_stored,
            on_dropped=self._count_dropped,
            max_queued=max_queued,
            now=now,
        )

    def _count_stored(self, count: int) -> None:
        self.stored += count

    def _count_dropped(self, reason: Dropped, count: int) -> None:
        self.dropped[reason] += count

    def rows(self) -> list[RequestRow]:
        with Session(self.store) as session:
            return list(session.scalars(select(RequestRow).order_by(RequestRow.id)))


@pytest.fixture
def pen(store: Store) -> Iterator[Pen]:
    pen = Pen(store, content_share=1.0, max_content_kib=1)
    pen.writer.start()
    yield pen
    pen.writer.close()


def content(payload: bytes = CONTENT, answer: bytes = ANSWER) -> Content:
    made = Content(Route.CHAT_COMPLETIONS, payload)
    made.add(answer)
    return made


def test_flush_waits_for_previously_added_rows(pen: Pen) -> None:
    for _ in range(3):
        pen.writer.add(RECORD)
    assert pen.writer.flush(5)
    assert len(pen.rows()) == pen.stored == 3


def test_closing_the_request_log_writes_the_queue(store: Store) -> None:
    pen = Pen(store)
    for index in range(50):
        pen.writer.add(RECORD._replace(request_id=f"req-{index}"))
    pen.writer.start()
    pen.writer.close()
    assert [row.request_id for row in pen.rows()] == [f"req-{index}" for index in range(50)]


def test_content_is_redacted_before_it_is_stored(pen: Pen) -> None:
    pen.writer.add(RECORD, content())
    pen.writer.flush(5)
    (row,) = pen.rows()
    assert row.prompt == '[{"role": "user", "content": "I am [mail]"}]'
    assert row.answer == "call [phone]"


@pytest.mark.parametrize(
    "long",
    [
        content(b'{"messages": "' + b"x" * 1100 + b'"}'),
        content(b'{"messages": "' + b"x" * 10_000 + b'"}'),
        content(answer=b'{"choices": [{"index": 0, "text": "' + b"x" * 1100 + b'"}]}'),
    ],
    ids=["prompt", "payload", "answer"],
)
def test_row_with_overlong_content_is_stored_without_content(pen: Pen, long: Content) -> None:
    pen.writer.add(RECORD, long)
    pen.writer.flush(5)
    (row,) = pen.rows()
    assert (row.prompt, row.answer) == (None, None)
    assert pen.dropped == {Dropped.CONTENT_LIMIT: 1}


NESTED = b'{"messages": [' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"]}"


@pytest.mark.parametrize("odd", [NESTED, b'{"prompt": [52, 1287, 9]}'], ids=["nested", "tokens"])
def test_malformed_content_is_dropped_without_losing_its_row_or_the_content_of_other_rows(
    store: Store, odd: bytes
) -> None:
    pen = Pen(store, content_share=1.0)
    pen.writer.start()
    for payload in (CONTENT, odd, CONTENT):
        pen.writer.add(RECORD, content(payload))
    pen.writer.close()
    assert [row.prompt is not None for row in pen.rows()] == [True, False, True]
    assert pen.dropped == {Dropped.CONTENT_UNREADABLE: 1}
    assert pen.writer._content_bytes == 0


def test_memory_for_queued_content_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "MAX_QUEUED_CONTENT_BYTES", 3 * content().size)
    pen = Pen(store, content_share=1.0)
    for _ in range(5):
        pen.writer.add(RECORD, content())
    assert pen.dropped == {Dropped.CONTENT_LIMIT: 2}
    pen.writer.start()
    pen.writer.flush(5)
    pen.writer.add(RECORD, content())
    pen.writer.close()
    assert sum(row.prompt is not None for row in pen.rows()) == 4


def test_content_that_is_checked_but_not_stored_is_freed_from_memory(pen: Pen) -> None:
    checked = content()
    checked.stored, checked.expects_json = False, True
    pen.writer.add(RECORD, checked)
    assert pen.writer.flush(5)
    (row,) = pen.rows()
    assert (row.prompt, row.valid) == (None, False)
    assert pen.writer._content_bytes == 0


def test_row_is_dropped_and_counted_without_waiting_if_the_queue_is_full(store: Store) -> None:
    pen = Pen(store, max_queued=10)
    started = time.monotonic()
    for _ in range(25):
        pen.writer.add(RECORD)
    assert time.monotonic() - started < 1
    assert pen.dropped == {Dropped.QUEUE_FULL: 15}


def test_flush_gives_up_if_the_writer_is_stuck(store: Store) -> None:
    assert not Pen(store).writer.flush(0.05)


def test_next_batch_of_requests_is_logged_even_if_logging_the_previous_batch_failed(
    pen: Pen, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(store: Store, batch: list[object]) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(request_log, "add_requests", fail)
        pen.writer.add(RECORD)
        pen.writer.flush(5)
    pen.writer.add(RECORD)
    pen.writer.flush(5)
    assert pen.dropped == {Dropped.STORE_FAILED: 1}
    assert len(pen.rows()) == 1
    assert "no space left on device" in caplog.text


@pytest.mark.slow
def test_rows_wait_while_the_database_is_unavailable_and_overflow_is_counted(
    postgresql: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "_RETRY_S", 0.05)
    pen = Pen(postgresql.empty(), max_queued=3)
    pen.writer.start()
    postgresql.stop()
    try:
        began = time.monotonic()
        for _ in range(5):
            pen.writer.add(RECORD)
        assert time.monotonic() - began < 0.1
        assert not pen.writer.flush(0.5)
    finally:
        postgresql.start()
    assert pen.writer.flush(10)
    pen.writer.close()
    assert (len(pen.rows()), pen.dropped) == (3, {Dropped.QUEUE_FULL: 2})


@pytest.mark.slow
def test_closing_the_request_log_does_not_wait_for_an_unavailable_database(
    postgresql: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "_RETRY_S", 0.05)
    pen = Pen(postgresql.empty())
    pen.writer.start()
    postgresql.stop()
    try:
        pen.writer.add(RECORD)
        began = time.monotonic()
        pen.writer.close(timeout_s=5)
        assert time.monotonic() - began < 5
    finally:
        postgresql.start()
    assert pen.dropped == {Dropped.STORE_FAILED: 1}


def test_application_log_contains_no_user_text_if_storing_fails(pen: Pen, caplog: pytest.LogCaptureFixture) -> None:
    with pen.store.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE requests RENAME TO away")
    pen.writer.add(RECORD, content(b'{"messages": ["SECRET"]}'))
    pen.writer.flush(5)
    assert pen.dropped == {Dropped.STORE_FAILED: 1}
    assert "no such table" in caplog.text
    assert "SECRET" not in caplog.text


def test_closing_the_request_log_gives_up_and_counts_lost_rows_if_the_store_hangs(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(request_log, "add_requests", lambda store, batch: release.wait(10))
    monkeypatch.setattr(request_log, "_BATCH", 1)
    pen = Pen(store, max_queued=3)
    pen.writer.start()
    pen.writer.add(RECORD)
    time.sleep(0.05)
    for _ in range(3):
        pen.writer.add(RECORD)
    pen.writer.close(timeout_s=0.1)
    assert pen.dropped[Dropped.STORE_FAILED] == 3
    release.set()


def test_no_content_is_stored_if_the_content_share_is_zero(store: Store) -> None:
    writer = Pen(store).writer
    assert not any(writer.wants_content() for _ in range(1000))


def test_content_is_stored_for_the_configured_share_of_requests(store: Store) -> None:
    writer = Pen(store, content_share=0.3).writer
    assert 2400 < sum(writer.wants_content() for _ in range(10_000)) < 3600  # 13 standard deviations


def test_old_rows_are_deleted_at_startup(store: Store) -> None:
    add_requests(store, [RECORD._replace(started_at=RECORD.started_at - timedelta(days=2)), RECORD])
    pen = Pen(store, max_age_days=1.0)
    pen.writer.start()
    pen.writer.close()
    assert len(pen.rows()) == 1


def test_no_rows_are_deleted_if_the_clock_jumps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add_requests(store, [RECORD] * 3)
    monkeypatch.setattr(request_log, "_PRUNE_EVERY_S", 0.01)
    asked, ahead = threading.Semaphore(0), timedelta()

    def now() -> datetime:
        asked.release()
        return datetime.now(UTC) + ahead

    pen = Pen(store, now=now)
    pen.writer.start()
    assert asked.acquire(timeout=5)
    ahead = timedelta(days=365)
    for _ in range(asked._value + 5):
        assert asked.acquire(timeout=5)
    pen.writer.close()
    assert len(pen.rows()) == 3


def test_rows_are_not_deleted_at_startup_if_every_row_appears_expired(store: Store) -> None:
    add_requests(store, [RECORD._replace(started_at=RECORD.started_at - timedelta(days=60))] * 3)
    pen = Pen(store)
    pen.writer.start()
    pen.writer.close()
    assert len(pen.rows()) == 3


@pytest.mark.slow
def test_only_the_content_is_lost_if_a_redaction_pattern_takes_too_long(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    pen = Pen(store, content_share=1.0, redact=("(a|aa)+$",))
    pen.writer.start()
    endless = b'{"messages": [{"role": "user", "content": "' + b"a" * 200 + b'!"}]}'
    for payload in (endless, CONTENT, endless):
        pen.writer.add(RECORD, content(payload))
    assert pen.writer.redacted("a" * 200 + "!") is None
    assert pen.writer.redacted("b@c.de") == "[mail]"
    pen.writer.close()
    assert [row.prompt is not None for row in pen.rows()] == [False, True, False]
    assert pen.dropped == {Dropped.CONTENT_UNREDACTED: 3}
    assert caplog.text.count("the request_log.redact pattern '(a|aa)+$'") == 1
    assert "aaaa" not in caplog.text


@pytest.mark.slow
def test_size_limit_is_enforced_with_a_single_query_for_the_total_row_size(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_requests(store, [RECORD] * 50)
    monkeypatch.setattr(request_log, "_PRUNE_EVERY_S", 0.01)
    pen = Pen(store, content_share=1.0, max_mib=1, max_content_kib=64)
    with statements(store) as sent:
        pen.writer.start()
        for _ in range(10):
            pen.writer.add(RECORD)
            pen.writer.flush(5)
            time.sleep(0.02)
        assert sum("sum(" in statement for statement in sent) == 1
    long = b'{"messages": "' + b"x" * 60_000 + b'"}'
    for _ in range(40):
        pen.writer.add(RECORD, content(long))
    pen.writer.flush(5)
    time.sleep(0.1)
    pen.writer.close()
    assert 0.8 * 2**20 < sum(row.bytes for row in pen.rows()) <= 2**20


@pytest.mark.slow
def test_corrections_count_toward_the_size_limit_of_the_request_log(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "_PRUNE_EVERY_S", 0.01)
    pen = Pen(store, max_mib=1)
    pen.writer.start()
    for number in range(8):
        pen.writer.add(RECORD._replace(request_id=f"req-{number}"))
    pen.writer.flush(5)
    for number in range(8):
        stored = keep_feedback(store, f"req-{number}", Feedback(Rating.BAD, correction="c" * 2**18))
        assert stored is not None
        pen.writer.has_grown(stored.grown_bytes)
    time.sleep(0.1)
    pen.writer.close()
    assert sum(row.bytes for row in pen.rows()) <= 2**20


def test_row_sizes_are_summed_again_after_a_failed_pruning(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "_PRUNE_EVERY_S", 0.01)
    known: list[int | None] = []

    def prune(store: Store, *, known_bytes: int | None, **_: object) -> Pruned:
        known.append(known_bytes)
        if len(known) == 2:
            raise OSError("disk full")
        return Pruned(0, 1)

    monkeypatch.setattr(request_log, "prune_requests", prune)
    pen = Pen(store)
    pen.writer.start()
    time.sleep(0.1)
    pen.writer.close()
    assert known[:4] == [None, 1, None, 1]


def test_row_sizes_are_summed_again_regularly_when_other_servers_may_add_rows(
    postgresql_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "_PRUNE_EVERY_S", 0.001)
    monkeypatch.setattr(request_log, "_SUMMED_EVERY", 3)
    known: list[int | None] = []

    def prune(store: Store, *, known_bytes: int | None, **_: object) -> Pruned:
        known.append(known_bytes)
        return Pruned(0, 1)

    monkeypatch.setattr(request_log, "prune_requests", prune)
    pen = Pen(postgresql_store)
    pen.writer.start()
    while len(known) < 6:
        time.sleep(0.01)
    pen.writer.close()
    assert known[:6] == [None, 1, None, 1, 1, None]


@pytest.mark.slow
def test_rows_added_under_load_share_a_transaction(pen: Pen, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    written = threading.Event()

    def count(store: Store, batch: list[object]) -> None:
        batches.append(len(batch))
        if sum(batches) == 100:
            written.set()

    monkeypatch.setattr(request_log, "add_requests", count)
    for _ in range(100):
        pen.writer.add(RECORD)
    assert written.wait(5)
    assert len(batches) <= 3
