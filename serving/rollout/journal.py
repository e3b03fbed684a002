"""Writes swaps and served versions to the store from one thread, in order, so that neither the event loop nor a swap
waits for the disk.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine as Store

from svc.store.desired import Desired
from svc.store.rollouts import add_rollout_step
from svc.store.served import Began, begin_serving, end_serving
from svc.store.swaps import SwapRecord, SwapResult, add_step, begin_swap, end_swap

log = logging.getLogger(__name__)

_ATTEMPTS = 5
"""Number of attempts to write a step. Steps may be lost; all other records are retried until they are written."""
_PAUSE_S = 1.0
_MAX_PAUSE_S = 30.0
_CLOSE_S = 20.0  # longer than the store waits for another writer


class Journal:
    """Records swaps, their steps and results, and the served versions in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._gave_up = threading.Event()
        self._unwritten: dict[int, SwapResult] = {}

    @property
    def unwritten(self) -> Mapping[int, SwapResult]:
        """Results of swaps that are not in the store yet, by swap id; a copy."""
        return self._unwritten.copy()

    async def begin(self, desired: Desired) -> int:
        """Record the beginning of a swap and return its id, without waiting for unwritten results of earlier swaps.

        Raises:
            SQLAlchemyError: the write failed; the swap must not begin, because clients could not follow it.
        """
        return await asyncio.to_thread(begin_swap, self._store, desired)

    def step(self, swap_id: int, text: str) -> None:
        """Record a step in the background; it is lost if a few attempts fail."""
        log.info("swap %d: %s", swap_id, text)
        self._writer.submit(self._write, lambda: add_step(self._store, swap_id, text), _ATTEMPTS)

    def rollout_step(self, rollout_id: int, text: str) -> None:
        """Record a step of a rollout in the background; it is lost if a few attempts fail."""
        log.info("rollout %d: %s", rollout_id, text)
        self._writer.submit(self._write, lambda: add_rollout_step(self._store, rollout_id, text), _ATTEMPTS)

    def end(self, swap_id: int, result: SwapResult) -> None:
        """Record a swap's result in the background, after its steps; retried until it is written."""
        log.info("swap %d: %s", swap_id, result.outcome)
        self._unwritten[swap_id] = result
        self._writer.submit(self._write_end, swap_id, result)

    def serves(self, desired: Desired, began_by: Began) -> None:
        """Record in the background that a version is now serving; retry until written."""
        now = datetime.now(UTC)
        self._writer.submit(self._write, lambda: begin_serving(self._store, desired, began_by, now))

    def stopped(self, name: str) -> None:
        """Record in the background that a name is no longer served; retry until written."""
        now = datetime.now(UTC)
        self._writer.submit(self._write, lambda: end_serving(self._store, name, now))

    def close(self, timeout_s: float | None = None) -> None:
        """Write the pending records and stop. Records not written in time are lost; the next start closes their swaps.

        Args:
            timeout_s: longest time, seconds; by default longer than the wait for a busy store.
        """
        last = self._writer.submit(lambda: None)
        self._writer.shutdown(wait=False)
        try:
            last.result(_CLOSE_S if timeout_s is None else timeout_s)
        except TimeoutError:
            self._gave_up.set()
            self._writer.shutdown(wait=False, cancel_futures=True)
            log.error("could not write the results of %d swaps; the next start closes them", len(self._unwritten))

    def _write_end(self, swap_id: int, result: SwapResult) -> None:
        if self._write(lambda: end_swap(self._store, swap_id, result)):
            self._unwritten.pop(swap_id, None)

    def _write(self, write: Callable[[], None], attempts: int | None = None) -> bool:
        """Write a record; return whether that succeeded. Without `attempts`, retry until `close` gives up."""
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
    """Return the JSON values of a swap and of its result, which are null while the swap is in progress."""
    result = asdict(swap.result) if swap.result else dict.fromkeys(field.name for field in fields(SwapResult))
    return {"generation": swap.generation, "started_at": swap.started_at.isoformat(timespec="seconds"), **result}
