"""Writes a row for each request that ended, from one thread, in batches, and forgets the old ones.

A request never waits for it: what the queue has no room for is dropped and counted, and so is what the store does not
take. Content is read, redacted and cut here, not while the request runs.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import NamedTuple

from sqlalchemy import Engine as Store

from serving.telemetry.content import Content, answer_text, prompt_text
from serving.telemetry.retention_clock import RetentionClock
from serving.telemetry.traces.request_trace import RequestTrace, SpanSink
from svc.redaction import RedactionTimeoutError, Redactor
from svc.settings import RequestLogSettings
from svc.store.requests import Dropped, RequestRecord, add_requests, newest_request_at, prune_requests

log = logging.getLogger(__name__)

MAX_QUEUED = 10_000
MAX_QUEUED_CONTENT_BYTES = 64 * 2**20
_BATCH = 1000
"""Rows of one transaction: to sync its disk takes longer than to write them."""
_BREATH_S = 0.0005
"""After each content. Without it the event loop has to wait for Python's switch interval, 5 ms, at each of its turns:
with 8 streams at full load the 99th percentile was 113 ms, and 41 with it."""
_SPANS_AT_ONCE = 50
"""To make so many takes a millisecond or two."""
_GATHER_S = 0.2
"""Rows of so long go into one transaction, so that a busy server syncs its disk a few times a second."""
_PRUNE_EVERY_S = 60.0
_ESCAPED = 6  # a character takes at most so many times its bytes in JSON that is all ASCII: \u00e9
_CLOSE_S = 20.0  # longer than the store waits for another writer


class _Entry(NamedTuple):
    record: RequestRecord
    content: Content | None
    trace: RequestTrace | None


class RequestLog:
    """Writes the rows.

    Args:
        on_stored: hears how many rows were written.
        on_dropped: hears why, and how many were lost.
        spans: gets the rows of requests that are traced, also those that the store does not take.
        now: the wall clock.
    """

    def __init__(
        self,
        store: Store,
        settings: RequestLogSettings,
        *,
        on_stored: Callable[[int], None],
        on_dropped: Callable[[Dropped, int], None],
        spans: SpanSink | None = None,
        max_queued: int = MAX_QUEUED,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._settings = settings
        self._retention = RetentionClock(timedelta(days=settings.max_age_days), now=now)
        self._redactor = Redactor(settings.redact)
        self._slow_patterns: set[str] = set()
        self._on_stored = on_stored
        self._on_dropped = on_dropped
        self._spans = spans
        self._max_queued = max_queued
        # What waits stays here until it is written; an event is set when all before it is.
        self._queue = deque[_Entry | threading.Event]()
        self._queued_ids = set[str]()
        self._arrived = threading.Event()  # the first row since the writer looked: not each one wakes it
        self._hurry = threading.Event()  # what has arrived is not held back
        self._closing = False
        self._lock = threading.Lock()  # of these two
        self._content_bytes = 0
        self._grown_bytes = 0  # what was written since the last pruning
        self._stored_bytes: int | None = None  # by all rows at the last pruning; None: to be summed up
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)

    def start(self) -> None:
        """Begins to write."""
        self._thread.start()

    def wants_content(self) -> bool:
        """Decides for one request whether its prompt and answer are kept."""
        share = self._settings.content_share
        return share > 0 and random.random() < share  # noqa: S311 - a sample, no secret

    def add(self, record: RequestRecord, content: Content | None = None, trace: RequestTrace | None = None) -> None:
        """Takes a record, or drops it; returns at once.

        Args:
            content: where it is kept.
            trace: where the request gets a span.
        """
        if len(self._queue) >= self._max_queued:
            self._on_dropped(Dropped.QUEUE_FULL, 1)
            if trace and self._spans:
                self._spans.drop()
            return
        if content is not None and not self._reserve(content):
            self._on_dropped(Dropped.CONTENT_LIMIT, 1)
            content = None
        self._queued_ids.add(record.request_id)
        self._queue.append(_Entry(record, content, trace))
        if not self._arrived.is_set():
            self._arrived.set()
        if len(self._queue) >= _BATCH and not self._hurry.is_set():
            self._hurry.set()

    def is_queued(self, request_id: str) -> bool:
        """Return whether a request's row is on its way to the store."""
        return request_id in self._queued_ids

    def flush(self, timeout_s: float) -> bool:
        """Waits until all that was added before is in the store; False after `timeout_s`."""
        done = threading.Event()
        self._queue.append(done)
        self._wake()
        return done.wait(timeout_s)

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Writes what is queued, and ends; what is not written after `timeout_s` is lost and counted."""
        self._closing = True
        self._wake()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.error("about %d rows of the request log were not written in time", len(self._queue))
            self._on_dropped(Dropped.STORE_FAILED, len(self._queue))

    def _wake(self) -> None:
        self._hurry.set()
        self._arrived.set()

    def redacted(self, text: str | None) -> str | None:
        """A text that comes on another way, as it may be kept; None where it may not."""
        try:
            return self._redactor.text(text) if text else None
        except RedactionTimeoutError as error:
            self._count_unredacted(error)
            return None

    def _count_unredacted(self, error: RedactionTimeoutError) -> None:
        if error.pattern not in self._slow_patterns:
            self._slow_patterns.add(error.pattern)
            log.error("content is not kept: %s", error)
        self._on_dropped(Dropped.CONTENT_UNREDACTED, 1)

    def has_grown(self, size: int) -> None:
        """Hears how many bytes more the rows in the store take, of what this log did not write as well."""
        with self._lock:
            self._grown_bytes += size

    def _reserve(self, content: Content) -> bool:
        """Return whether there is memory for it, which is then taken."""
        with self._lock:
            if content.too_long or self._content_bytes + content.size > MAX_QUEUED_CONTENT_BYTES:
                return False
            self._content_bytes += content.size
            return True

    def _run(self) -> None:
        next_prune = time.monotonic()
        ended = False
        while not ended:
            if time.monotonic() >= next_prune:
                self._prune()
                next_prune = time.monotonic() + _PRUNE_EVERY_S
            if not self._arrived.wait(max(0.0, next_prune - time.monotonic())):
                continue
            self._hurry.wait(_GATHER_S)
            # Cleared before what they speak of is looked at: whatever comes later sets them again.
            self._arrived.clear()
            self._hurry.clear()
            ended = self._closing
            for _ in range(0, len(self._queue), _BATCH):
                self._write_batch()

    def _write_batch(self) -> None:
        # By position: other threads append meanwhile, and an iterator of the queue would fail.
        batch = [self._queue[place] for place in range(min(_BATCH, len(self._queue)))]
        entries = [item for item in batch if isinstance(item, _Entry)]
        try:
            records = [self._with_content(entry) for entry in entries]
            self._add_spans(entries, records)
            if records:
                add_requests(self._store, records)
        except Exception:  # the boundary of this thread, which must outlive a full disk and an odd request alike
            log.exception("%d rows of the request log were not written", len(entries))
            self._on_dropped(Dropped.STORE_FAILED, len(entries))
        else:
            self.has_grown(sum(record.bytes for record in records))
            self._on_stored(len(records))
        self._queued_ids.difference_update(entry.record.request_id for entry in entries)
        for item in batch:
            self._queue.popleft()
            if isinstance(item, threading.Event):
                item.set()

    def _add_spans(self, entries: Sequence[_Entry], records: Sequence[RequestRecord]) -> None:
        spans = self._spans
        if spans is None:
            return
        traced = [(entry.trace, record) for entry, record in zip(entries, records, strict=True) if entry.trace]
        for made, (trace, record) in enumerate(traced, start=1):
            try:
                spans.add(trace, record)
            except Exception:  # a boundary too: no span is worth a row
                log.exception("no span could be made of request %s", record.request_id)
                spans.drop()
            if made % _SPANS_AT_ONCE == 0:
                time.sleep(_BREATH_S)

    def _with_content(self, entry: _Entry) -> RequestRecord:
        """Return the row with its redacted prompt and answer, if they can be kept."""
        record, content = entry.record, entry.content
        if content is None:
            return record
        with self._lock:
            self._content_bytes -= content.size
        limit = self._settings.max_content_kib * 1024
        if len(content.payload) <= _ESCAPED * limit:
            time.sleep(_BREATH_S)
            try:
                prompt, answer = prompt_text(content, self._redactor), answer_text(content, self._redactor)
            except RedactionTimeoutError as error:
                self._count_unredacted(error)
                return record
            except (ValueError, RecursionError):  # of one request, which must not cost the others their rows
                log.warning("the content of request %s cannot be kept", record.request_id, exc_info=True)
                self._on_dropped(Dropped.CONTENT_UNREADABLE, 1)
                return record
            if max(len(prompt.encode("utf-8")), len(answer.encode("utf-8"))) <= limit:
                return record._replace(prompt=prompt, answer=answer)
        self._on_dropped(Dropped.CONTENT_LIMIT, 1)
        return record

    def _prune(self) -> None:
        with self._lock:
            grown, self._grown_bytes = self._grown_bytes, 0
        known = None if self._stored_bytes is None else self._stored_bytes + grown
        max_bytes = self._settings.max_mib * 2**20
        self._stored_bytes = None
        try:
            before = self._retention.oldest_kept(partial(newest_request_at, self._store))
            pruned = prune_requests(self._store, before=before, max_bytes=max_bytes, known_bytes=known)
        except Exception:  # the boundary of this thread, as above
            log.exception("old rows of the request log were not deleted")
        else:
            self._stored_bytes = pruned.left_bytes
            if pruned.rows:
                log.info("forgot %d old requests", pruned.rows)
