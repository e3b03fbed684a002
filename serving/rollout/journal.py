"""Writes swaps and served versions to the store in order, using a single background thread.

This way, neither the event loop nor a swap waits for the disk.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine as Store

from serving.rollout.served import Began, begin_serving, end_serving
from svc.store.desired import Desired
from svc.store.rollouts import add_rollout_step
from svc.store.swaps import SwapRecord, SwapResult, add_step, begin_swap, end_swap

log = logging.getLogger(__name__)

_ATTEMPTS = 5
"""Number of attempts to write a step of a swap or rollout. Steps may be lost, but all other records are
retried until they are written."""
_PAUSE_S = 1.0
_MAX_PAUSE_S = 30.0
_CLOSE_S = 20.0  # longer than the store waits for another writer


class Journal:
    """Records in the store which versions a server serves, and the steps and results of its swaps.

    Args:
        server: id of the server; empty if no other server can use the store.
    """

    def __init__(self, store: Store, server: str = "") -> None:
        self._store = store
        self._server = server
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._gave_up = threading.Event()
        self._unwritten: dict[int, SwapResult] = {}

    @property
    def unwritten(self) -> Mapping[int, SwapResult]:
        """A copy of the swap results that have not been written to the store yet, keyed by swap id."""
        return self._unwritten.copy()

    def begin(self, desired: Desired) -> int:
        """Record that a swap has begun, and return its id. This does not wait for unwritten results of earlier swaps.

        Raises:
            SQLAlchemyError: the write failed. The swap must not begin, because clients could not track its progress.
        """
        return begin_swap(self._store, desired, server=self._server)

    def step(self, swap_id: int, text: str) -> None:
        """Record a step of a swap. It is written in the background, and lost if all attempts to write it fail."""
        log.info("swap %d: %s", swap_id, text)
        self._writer.submit(self._write, lambda: add_step(self._store, swap_id, text), _ATTEMPTS)

    def rollout_step(self, rollout_id: int, text: str) -> None:
        """Record a step of a rollout. It is written in the background, and lost if all attempts to write it fail."""
        log.info("rollout %d: %s", rollout_id, text)
        self._writer.submit(self._write, lambda: add_rollout_step(self._store, rollout_id, text), _ATTEMPTS)

    def end(self, swap_id: int, result: SwapResult) -> None:
        """Record a swap's result. It is written in the background, after the swap's steps, and the write is retried
        until it succeeds.
        """
        log.info("swap %d: %s", swap_id, result.outcome)
        self._unwritten[swap_id] = result
        self._writer.submit(self._write_end, swap_id, result)

    def serves(self, desired: Desired, began_by: Began) -> None:
        """Record in the background that this server has started serving a version. The write is retried until it
        succeeds.
        """
        now = datetime.now(UTC)
        self._writer.submit(
            self._write, lambda: begin_serving(self._store, desired, began_by, now, server=self._server)
        )

    def stopped(self, name: str) -> None:
        """Record in the background that a model is no longer served. The write is retried until it succeeds."""
        now = datetime.now(UTC)
        self._writer.submit(self._write, lambda: end_serving(self._store, name, now, server=self._server))

    def close(self, timeout_s: float | None = None) -> None:
        """Write the pending records, then stop.

        Records that are not written in time are lost. Swaps whose results are lost are marked as ended when
        the server starts again.

        Args:
            timeout_s: maximum time to spend on writing, in seconds. The default exceeds the longest wait for a busy
                store.
        """
        last = self._writer.submit(lambda: None)
        self._writer.shutdown(wait=False)
        try:
            last.result(_CLOSE_S if timeout_s is None else timeout_s)
        except TimeoutError:
            self._gave_up.set()
            self._writer.shutdown(wait=False, cancel_futures=True)
            log.error(
                "could not write the results of %d swaps; they will be marked as ended when the server next starts",
                len(self._unwritten),
            )

    def _write_end(self, swap_id: int, result: SwapResult) -> None:
        if self._write(lambda: end_swap(self._store, swap_id, result)):
            self._unwritten.pop(swap_id, None)

    def _write(self, write: Callable[[], None], attempts: int | None = None) -> bool:
        """Write a record and return whether the write succeeded.

        Without `attempts`, the write is retried until it succeeds or `close` times out.
        """
        failures, pause_s = 0, _PAUSE_S
        while True:
            try:
                write()
            except Exception:  # the boundary of this thread, which must survive any error of the store
                log.exception("could not write to the journal of swaps")
            else:
                return True
            failures += 1
            if failures == attempts or self._gave_up.wait(pause_s):
                return False
            if attempts is None:
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)


def swap_row(swap: SwapRecord) -> dict[str, Any]:
    """Return a swap and its result as JSON values.

    The result's values are null while the swap is in progress.
    """
    result = asdict(swap.result) if swap.result else dict.fromkeys(field.name for field in fields(SwapResult))
    return {"generation": swap.generation, "started_at": swap.started_at.isoformat(timespec="seconds"), **result}
