"""Computes drift features of requests in a separate process, and stores them without any text.

    request log ──records with texts──▶ queue ──≤ 100 at a time──▶ process: items ──▶ store

Importing the feature code takes 2 s and 300 MB, and each prompt takes up to 5 ms of CPU time. The process
is therefore not started until the first request for a version whose drift reference allows a comparison. It runs at a
low priority (niceness 10) and exits with its parent. If it dies, the next batch starts another process. Texts are kept
only in memory, and are neither stored nor logged.
"""

import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING

from svc.child_process import end_with_parent
from svc.drift_reference.text_embedding import TEXT_SPACE_FILE
from svc.errors import IntegrityError, NotFoundError
from svc.redaction import Redactor
from svc.registry.registry import REFERENCE_FOLDER, Registry
from svc.settings.settings import Settings
from svc.store.requests import RequestRecord
from svc.version import Target

if TYPE_CHECKING:
    from svc.drift_reference.item import ItemMaker

log = logging.getLogger(__name__)

BURST = 2_000
PER_DAY = 10_000
"""Maximum number of requests per version and day whose features are stored. A burst of up to `BURST` requests
is stored in addition. Monitoring does not compare more requests than this."""
MAX_QUEUED = 2_000
MAX_QUEUED_BYTES = 64 * 2**20
MAX_STORED = 50_000
"""Maximum number of drift items kept per version and format. This many items take up about 100 MB. Monitoring normally
deletes old items long before this limit is reached."""
_NICENESS = 10
_DAY_S = 86_400.0
_BATCH = 100
"""Maximum number of records per batch. A prompt takes 0.9 ms in a batch of 100, but 4.5 ms on its own."""
_GATHER_S = 1.0
_ANSWER_TIMEOUT_S = 600.0
"""Seconds without a response after which the process is considered hung. On a busy machine, starting the process takes
a minute."""
_PAUSE_S = 10.0
"""Seconds to wait before starting another process after the previous process died during a batch."""
_CLOSE_S = 2.0
"""Seconds allowed for storing the queued records when the server stops. Records that are not stored by then are lost,
for example if the feature process is still starting."""
_STOP_S = 0.1
_PRUNED_AFTER = 1_000
"""A version's old items are deleted each time this number of new items has been stored."""
_REFERENCES = 8
"""Maximum number of drift references held in memory. Each takes 20 MB."""


@dataclass(eq=False)
class FeatureProcess:
    """Stores drift features for a limited sample of requests.

    Attributes:
        on_dropped: function called with the number of requests whose features were lost.
        clock: function that returns monotonic time, in seconds.
    """

    settings: Settings
    on_dropped: Callable[[int], None]
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._buckets: dict[Target, tuple[float, float]] = {}  # tokens, and when they were counted
        self._compared: dict[Target, bool] = {}  # whether the version has a reference to compare requests with
        self._queue = deque[RequestRecord]()
        self._queued_bytes = 0
        self._lock = threading.Lock()  # for the two attributes above
        self._arrived = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()  # queued records are no longer stored
        self._thread: threading.Thread | None = None
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def wants(self, target: Target) -> bool:
        """Return whether to store a request's features, and count it if so. Only called by the event loop."""
        if not self._compared.get(target, True):
            return False
        now = self.clock()
        tokens, counted_at = self._buckets.get(target, (float(BURST), now))
        tokens = min(BURST, tokens + (now - counted_at) / _DAY_S * PER_DAY)
        wanted = tokens >= 1
        self._buckets[target] = tokens - wanted, now
        return wanted

    def add(self, records: Sequence[RequestRecord]) -> None:
        """Queue records that are already in the store, along with their redacted texts. Returns immediately."""
        with self._lock:
            taken = 0
            for record in records:
                if len(self._queue) >= MAX_QUEUED or self._queued_bytes + record.bytes > MAX_QUEUED_BYTES:
                    break
                self._queue.append(record)
                self._queued_bytes += record.bytes
                taken += 1
        if taken < len(records):
            self.on_dropped(len(records) - taken)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="drift-features", daemon=True)
            self._thread.start()
        self._arrived.set()

    def close(self, timeout_s: float | None = None) -> None:
        """Wait until the features of queued records are stored, then stop the process.

        After `timeout_s` seconds (default: `_CLOSE_S`), the process is stopped in any case, and the remaining features
        are lost.
        """
        self._closing.set()
        self._arrived.set()
        if self._thread:
            self._thread.join(_CLOSE_S if timeout_s is None else timeout_s)
            self._abandoned.set()
            while self._thread.is_alive():
                if self._process:
                    self._process.kill()  # wakes the thread if it waits for the process
                self._thread.join(_STOP_S)
        if self._queue:
            self.on_dropped(len(self._queue))

    def _run(self) -> None:
        ended = False
        while not ended:
            self._arrived.wait()
            self._closing.wait(_GATHER_S)
            self._arrived.clear()
            ended = self._closing.is_set()
            while not self._abandoned.is_set() and (batch := self._take()):
                try:
                    self._store(batch)
                except Exception:  # the boundary of this thread; no message here contains texts
                    log.exception("could not store the drift features of %d requests", len(batch))
                    self.on_dropped(len(batch))
        self._stop_process()

    def _take(self) -> list[RequestRecord]:
        with self._lock:
            batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
            self._queued_bytes -= sum(record.bytes for record in batch)
        return batch

    def _store(self, batch: Sequence[RequestRecord]) -> None:
        """Have the feature process compute and store a batch's features, making at most two attempts."""
        batch = [record for record in batch if self._can_compare(target_of(record))]
        if not batch:
            return
        # A batch is tried twice: the process may have died for another reason. Features that were stored are skipped.
        lost, off = self._ask(batch) or self._ask(batch) or (len(batch), set[Target]())
        self._compared.update(dict.fromkeys(off, False))
        if lost:
            self.on_dropped(lost)

    def _ask(self, batch: Sequence[RequestRecord]) -> tuple[int, set[Target]] | None:
        """Return the process's reply to a batch (see `_FeatureMaker.store`), or None if it dies or hangs."""
        if self._abandoned.is_set():
            return None
        connection = self._running()
        try:
            connection.send(batch)
            if not connection.poll(_ANSWER_TIMEOUT_S):
                raise TimeoutError
            answer: tuple[int, set[Target]] = connection.recv()
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            self._stop_process()
            if not self._closing.is_set():
                log.error("the process that computes drift features died or hung: %s", type(error).__name__)
                self._closing.wait(_PAUSE_S)
            return None
        return answer

    def _can_compare(self, target: Target) -> bool:
        """Return whether a version's drift reference includes the text space (the embedding in which texts are
        compared). The text space is not loaded.
        """
        if target not in self._compared:
            try:
                files = Registry.of(self.settings).manifest(target.version).reference
                self._compared[target] = any(file.path == f"{REFERENCE_FOLDER}/{TEXT_SPACE_FILE}" for file in files)
            except (NotFoundError, IntegrityError):
                self._compared[target] = False
        return self._compared[target]

    def _running(self) -> Connection:
        """Return the connection to the process, starting the process if necessary."""
        if self._process and not self._process.is_alive():
            log.error("the process that computes drift features exited with code %s", self._process.exitcode)
            self._stop_process()
        if self._connection is None:
            context = get_context("spawn")  # not forked: the server has threads
            self._connection, other_end = context.Pipe()
            self._process = context.Process(target=_work, args=(other_end, self.settings), daemon=True)
            self._process.start()
            other_end.close()  # otherwise the process's exit would not close the connection
        return self._connection

    def _stop_process(self) -> None:
        if self._process and self._connection:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = None


def target_of(record: RequestRecord) -> Target:
    """Return the target (version and format) that answered a request.

    Raises:
        ValueError: no version answered the request.
    """
    if record.version is None or record.format is None:
        raise ValueError(f"no version answered request {record.request_id}")
    return Target(record.version, record.format)


def _work(connection: Connection, settings: Settings) -> None:
    """Compute and store features until the parent process exits."""
    end_with_parent()
    os.nice(_NICENESS)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    maker = _FeatureMaker(settings)
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            connection.send(maker.store(connection.recv()))


class _FeatureMaker:
    """Computes and stores drift features, in a separate process."""

    def __init__(self, settings: Settings) -> None:
        from svc.store.database import open_store

        self._registry = Registry.of(settings)
        self._store = open_store(settings)
        self._redactor = Redactor(settings.request_log.redact)
        self._maker = lru_cache(maxsize=_REFERENCES)(self._read)
        self._added: dict[Target, int] = {}  # since items were pruned

    def store(self, batch: Sequence[RequestRecord]) -> tuple[int, set[Target]]:
        """Compute and store the features of a batch.

        Returns:
            The number of requests whose features were lost due to an unexpected error, and the targets (versions in a
            given format) for which there is no usable drift reference.
        """
        lost, off = 0, set[Target]()
        records: dict[Target, list[RequestRecord]] = {}
        for record in batch:
            records.setdefault(target_of(record), []).append(record)
        for target, group in records.items():
            try:
                self._store_of(target, group)
            except NotFoundError:
                off.add(target)
            except IntegrityError as error:
                log.error("cannot store drift features for requests to %s: %s", target, error)
                off.add(target)
            except Exception as error:  # noqa: BLE001 - the boundary of this process; the error's message may contain a text
                lost += len(group)
                where = "".join(traceback.format_tb(error.__traceback__))
                log.error(
                    "could not store the drift features of %d requests: %s\n%s", len(group), type(error).__name__, where
                )
        return lost, off

    def _store_of(self, target: Target, records: Sequence[RequestRecord]) -> None:
        from threadpoolctl import threadpool_limits

        from svc.store.drift_items import add_items, prune_items

        maker = self._maker(target)
        with threadpool_limits(1):  # after the libraries with threads were loaded, with the reference
            items = maker.make(records)
        added = self._added.get(target, _PRUNED_AFTER) + add_items(self._store, target, items)
        if added >= _PRUNED_AFTER:
            prune_items(self._store, target, (), newest=MAX_STORED)
            added = 0
        self._added[target] = added

    def _read(self, target: Target) -> "ItemMaker":
        from svc.drift_reference.item import ItemMaker
        from svc.drift_reference.reference import read_reference

        return ItemMaker(read_reference(self._registry, target, self._redactor))
