"""Writes a row for each completed request, and deletes old rows. A single thread does this in batches.

Requests never wait for the log: rows are dropped and counted if they do not fit into the queue or the store rejects
them. While a PostgreSQL database is unavailable, rows wait in the queue. Content is extracted, redacted and checked
against its size limit here rather than while the request runs.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import NamedTuple

from sqlalchemy import Engine as Store

from serving.telemetry.content import Content, answer_text, is_json_answer, prompt_text
from serving.telemetry.drift_features import FeatureProcess
from serving.telemetry.retention_clock import RetentionClock
from serving.telemetry.traces.request_trace import RequestTrace, SpanSink
from svc.redaction import RedactionTimeoutError, Redactor
from svc.settings.monitoring import RequestLogSettings
from svc.store.database import is_sqlite
from svc.store.requests import (
    Dropped,
    RequestOutcome,
    RequestRecord,
    add_requests,
    newest_request_at,
    prune_requests,
)
from svc.store.unavailable import StoreUnavailableError
from svc.version import Target

log = logging.getLogger(__name__)

MAX_QUEUED = 10_000
MAX_QUEUED_CONTENT_BYTES = 64 * 2**20
_BATCH = 1000
"""Maximum number of rows per transaction. Rows are batched because syncing the disk takes longer than
writing them."""
_YIELD_S = 0.0005
"""Seconds to pause after processing each request's content. Without the pause, the event loop has to wait for
Python's switch interval, 5 ms, in each iteration: with 8 streams at full load, the 99th percentile of the
latency was 113 ms without the pause and 41 ms with it."""
_SPANS_PER_PAUSE = 50
"""Number of spans that the thread creates between two pauses, in which the event loop can run. Creating them takes a
millisecond or two."""
_GATHER_S = 0.2
"""Seconds during which completed rows are collected for one transaction, so that a busy server only syncs a
few times per second."""
_PRUNE_EVERY_S = 60.0
_SUMMED_EVERY = 10
"""Number of deletions of old rows after which the total size of all rows is recalculated if other servers may also add
rows."""
_RETRY_S = 1.0
_ESCAPED = 6  # growth of a character, at most, in ASCII-only JSON: \u00e9
_GOOD_STATUS = 200
_CLOSE_S = 20.0  # longer than the store waits for another writer


class _Entry(NamedTuple):
    record: RequestRecord
    content: Content | None
    trace: RequestTrace | None


class _Texts(NamedTuple):
    """The redacted prompt and answer of a request."""

    prompt: str
    answer: str


@dataclass(eq=False)
class RequestLog:
    """Queues records of requests and writes them to the store.

    Attributes:
        on_stored: function called with the number of rows written.
        on_dropped: function called with the reason and the number of rows or contents that were lost.
        spans: sink for the rows of traced requests, including rows that the store rejects.
        features: process that stores drift features for some requests. It is closed along with the log.
        now: function that returns wall-clock time.
    """

    store: Store
    settings: RequestLogSettings
    on_stored: Callable[[int], None]
    on_dropped: Callable[[Dropped, int], None]
    spans: SpanSink | None = None
    features: FeatureProcess | None = None
    max_queued: int = MAX_QUEUED
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def __post_init__(self) -> None:
        self._retention = RetentionClock(timedelta(days=self.settings.max_age_days), now=self.now)
        self._redactor = Redactor(self.settings.redact)
        self._slow_patterns: set[str] = set()
        # Entries stay in the queue until they are written; an event is set when all entries before it are.
        self._queue = deque[_Entry | threading.Event]()
        self._queued_ids = set[str]()
        self._arrived = threading.Event()  # set by the first row since the last batch: not every row wakes the writer
        self._hurry = threading.Event()  # write without gathering more rows
        self._closing = False
        self._lock = threading.Lock()  # for the two attributes below
        self._content_bytes = 0
        self._grown_bytes = 0  # written since the last pruning
        self._stored_bytes: int | None = None  # of all rows at the last pruning; None: to be summed up
        self._prunings = 0
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wants_content(self) -> bool:
        """Decide at random, according to `content_share`, whether to store a request's prompt and answer."""
        share = self.settings.content_share
        return share > 0 and random.random() < share  # noqa: S311 - a sample, no secret

    def wants_features(self, target: Target) -> bool:
        """Return whether to store drift features of a request's prompt and answer."""
        return self.features is not None and self.features.wants(target)

    def add(self, record: RequestRecord, content: Content | None = None, trace: RequestTrace | None = None) -> None:
        """Queue a record, or drop it if the queue is full. Returns immediately.

        Args:
            content: the prompt and answer, if they or their drift features are to be stored.
            trace: the request's trace, if the request is to be traced.
        """
        if len(self._queue) >= self.max_queued:
            self.on_dropped(Dropped.QUEUE_FULL, 1)
            if trace and self.spans:
                self.spans.drop()
            return
        wanted = content is not None and (content.stored or (content.is_read and _is_good(record)))
        if not wanted:
            content = None
        if content is not None and not self._reserve(content):
            self._drop(content, Dropped.CONTENT_LIMIT)
            content = None
        self._queued_ids.add(record.request_id)
        self._queue.append(_Entry(record, content, trace))
        if not self._arrived.is_set():
            self._arrived.set()
        if len(self._queue) >= _BATCH and not self._hurry.is_set():
            self._hurry.set()

    def is_queued(self, request_id: str) -> bool:
        """Return whether a request's row is still waiting to be stored."""
        return request_id in self._queued_ids

    def flush(self, timeout_s: float) -> bool:
        """Wait until all records added so far have been stored. Return False if that takes longer than `timeout_s`."""
        done = threading.Event()
        self._queue.append(done)
        self._wake()
        return done.wait(timeout_s)

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Write the queued rows, then stop. Rows that cannot be written within `timeout_s` are lost and counted."""
        self._closing = True
        self._wake()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.error(
                "approximately %d rows of the request log were not written before the server stopped", len(self._queue)
            )
            self.on_dropped(Dropped.STORE_FAILED, len(self._queue))
        if self.features:
            self.features.close()

    def _wake(self) -> None:
        self._hurry.set()
        self._arrived.set()

    def redacted(self, text: str | None) -> str | None:
        """Return a text that is not part of a request, such as feedback, with redactions applied.

        Returns None if the text is empty or cannot be redacted.
        """
        try:
            return self._redactor.text(text) if text else None
        except RedactionTimeoutError as error:
            self._log_slow_pattern(error)
            self.on_dropped(Dropped.CONTENT_UNREDACTED, 1)
            return None

    def _log_slow_pattern(self, error: RedactionTimeoutError) -> None:
        if error.pattern not in self._slow_patterns:
            self._slow_patterns.add(error.pattern)
            log.error("could not redact a request's content, so it is not stored (logged once per pattern): %s", error)

    def _drop(self, content: Content, reason: Dropped) -> None:
        """Count lost content, separately for each purpose it was needed for (storage, drift features)."""
        if content.stored:
            self.on_dropped(reason, 1)
        if content.features:
            self.on_dropped(Dropped.FEATURES, 1)

    def has_grown(self, size: int) -> None:
        """Increase the recorded total size of the stored rows.

        Code outside this class must call this when it adds data to stored rows, for example when it stores feedback.
        """
        with self._lock:
            self._grown_bytes += size

    def _reserve(self, content: Content) -> bool:
        """Reserve memory for content, and return whether there was enough."""
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
            # Cleared before the queue is read: later rows set them again.
            self._arrived.clear()
            self._hurry.clear()
            ended = self._closing
            for _ in range(0, len(self._queue), _BATCH):
                self._write_batch()

    def _write_batch(self) -> None:
        # By index: other threads append meanwhile, and an iterator of the queue would fail.
        batch = [self._queue[place] for place in range(min(_BATCH, len(self._queue)))]
        entries = [item for item in batch if isinstance(item, _Entry)]
        try:
            texts = [self._read_texts(entry.record, entry.content) if entry.content else None for entry in entries]
            records = [_checked(_stored(entry, text), entry) for entry, text in zip(entries, texts, strict=True)]
            self._add_spans(entries, records)
            if records:
                self._add_requests(records)
        except Exception:  # the boundary of this thread, which must survive a full disk and malformed requests
            log.exception("could not write %d rows of the request log", len(entries))
            self.on_dropped(Dropped.STORE_FAILED, len(entries))
        else:
            self.has_grown(sum(record.bytes for record in records))
            self.on_stored(len(records))
            try:
                self._add_features(entries, texts)
            except Exception:  # a boundary too: lost features must not stop this thread
                log.exception("could not queue requests for computing drift features")
        self._queued_ids.difference_update(entry.record.request_id for entry in entries)
        for item in batch:
            self._queue.popleft()
            if isinstance(item, threading.Event):
                item.set()

    def _add_requests(self, records: Sequence[RequestRecord]) -> None:
        """Write rows, waiting while the database is unavailable. Later rows are queued, up to the queue's limit."""
        is_waiting = False
        while True:
            try:
                return add_requests(self.store, records)
            except StoreUnavailableError as error:
                if self._closing:
                    raise
                if not is_waiting:
                    log.warning("keeping rows of the request log in memory until the store accepts them: %s", error)
                is_waiting = True
            time.sleep(_RETRY_S)

    def _add_spans(self, entries: Sequence[_Entry], records: Sequence[RequestRecord]) -> None:
        spans = self.spans
        if spans is None:
            return
        traced = [(entry.trace, record) for entry, record in zip(entries, records, strict=True) if entry.trace]
        for count, (trace, record) in enumerate(traced, start=1):
            try:
                spans.add(trace, record)
            except Exception:  # a boundary too: a failed span must not cost the row
                log.exception("could not create the span for request %s", record.request_id)
                spans.drop()
            if count % _SPANS_PER_PAUSE == 0:
                time.sleep(_YIELD_S)

    def _add_features(self, entries: Sequence[_Entry], texts: Sequence[_Texts | None]) -> None:
        """Queue records for the computation of drift features.

        Call this only after the records' rows have been stored, because features are deleted along with the rows.
        """
        if self.features is None:
            return
        records = [
            entry.record._replace(prompt=text.prompt, answer=text.answer)
            for entry, text in zip(entries, texts, strict=True)
            if text and entry.content and entry.content.features and _is_good(entry.record)
        ]
        if records:
            self.features.add(records)

    def _read_texts(self, record: RequestRecord, content: Content) -> _Texts | None:
        """Return a request's redacted prompt and answer. If they cannot be read or redacted, or are too long, count
        them as lost and return None.
        """
        with self._lock:
            self._content_bytes -= content.size
        if not (content.stored or content.features):
            return None
        limit = self.settings.max_content_kib * 1024
        if len(content.payload) <= _ESCAPED * limit:
            time.sleep(_YIELD_S)
            try:
                prompt, answer = prompt_text(content, self._redactor), answer_text(content, self._redactor)
            except RedactionTimeoutError as error:
                self._log_slow_pattern(error)
                self._drop(content, Dropped.CONTENT_UNREDACTED)
                return None
            except (ValueError, RecursionError):  # one malformed request must not cost the others their rows
                if content.stored:
                    log.warning(
                        "could not read the content of request %s, so it is not stored",
                        record.request_id,
                        exc_info=True,
                    )
                self._drop(content, Dropped.CONTENT_UNREADABLE)
                return None
            if max(len(prompt.encode("utf-8")), len(answer.encode("utf-8"))) <= limit:
                return _Texts(prompt, answer)
        self._drop(content, Dropped.CONTENT_LIMIT)
        return None

    def _prune(self) -> None:
        with self._lock:
            grown, self._grown_bytes = self._grown_bytes, 0
        self._prunings += 1
        outdated = not is_sqlite(self.store) and self._prunings % _SUMMED_EVERY == 0
        known = None if self._stored_bytes is None or outdated else self._stored_bytes + grown
        max_bytes = self.settings.max_mib * 2**20
        self._stored_bytes = None
        try:
            before = self._retention.oldest_kept(partial(newest_request_at, self.store))
            pruned = prune_requests(self.store, before=before, max_bytes=max_bytes, known_bytes=known)
        except Exception:  # the boundary of this thread, as above
            log.exception("could not delete old rows of the request log")
        else:
            self._stored_bytes = pruned.left_bytes
            if pruned.rows:
                log.info("deleted %d old rows of the request log", pruned.rows)


def _stored(entry: _Entry, texts: _Texts | None) -> RequestRecord:
    """Return a request's row, including its prompt and answer if they are stored."""
    if texts is None or entry.content is None or not entry.content.stored:
        return entry.record
    return entry.record._replace(prompt=texts.prompt, answer=texts.answer)


def _checked(record: RequestRecord, entry: _Entry) -> RequestRecord:
    """Return the record, with `valid` set if a rollout needs to know whether the complete answer is valid JSON."""
    content = entry.content
    if content is None or not content.expects_json or content.too_long or not _is_good(record):
        return record
    time.sleep(_YIELD_S)
    try:
        return record._replace(valid=is_json_answer(content))
    except (ValueError, RecursionError):  # the engine's answer cannot be read
        return record._replace(valid=False)


def _is_good(record: RequestRecord) -> bool:
    """Return whether a request received a complete answer from a version. Only such answers are compared."""
    complete = record.status == _GOOD_STATUS and record.outcome is RequestOutcome.COMPLETE
    return complete and record.version is not None
