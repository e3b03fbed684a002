"""Writes swaps, and what serves, into the store from one thread, in order, so that neither the event loop nor a swap
waits for a disk.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from sqlalchemy import Engine as Store

from svc.store.desired import Desired
from svc.store.served import Began, begin_serving, end_serving
from svc.store.swaps import SwapResult, add_step, begin_swap, end_swap

log = logging.getLogger(__name__)

_ATTEMPTS = 5
"""At a step, which may be lost; all else is tried until it is written."""
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_CLOSE_S = 20.0  # longer than the store waits for another writer


class Journal:
    """The server's pen for the journal of swaps."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._gave_up = threading.Event()
        self._unwritten: dict[int, SwapResult] = {}

    @property
    def unwritten(self) -> Mapping[int, SwapResult]:
        """How those swaps ended whose end is not in the store yet, by their ids; a copy."""
        return self._unwritten.copy()

    async def begin(self, desired: Desired) -> int:
        """Writes that a swap has begun; returns its id. Waits for no end of another swap that cannot be written.

        Raises:
            SQLAlchemyError: the store does not take it; a swap that nobody can follow is not begun.
        """
        return await asyncio.to_thread(begin_swap, self._store, desired)

    def step(self, swap_id: int, text: str) -> None:
        """Adds a step, soon; it is lost where the store takes it at none of a few attempts."""
        log.info("swap %d: %s", swap_id, text)
        self._writer.submit(self._write, lambda: add_step(self._store, swap_id, text), _ATTEMPTS)

    def end(self, swap_id: int, result: SwapResult) -> None:
        """Writes how it ended, soon, and after all its steps; again and again until the store takes it."""
        log.info("swap %d: %s", swap_id, result.outcome)
        self._unwritten[swap_id] = result
        self._writer.submit(self._write_end, swap_id, result)

    def serves(self, desired: Desired, began_by: Began) -> None:
        """Writes that a version serves from now on, soon; again and again until the store takes it."""
        now = datetime.now(UTC)
        self._writer.submit(self._write, lambda: begin_serving(self._store, desired, began_by, now))

    def stopped(self, name: str) -> None:
        """Writes that nothing serves under a name any more, likewise."""
        now = datetime.now(UTC)
        self._writer.submit(self._write, lambda: end_serving(self._store, name, now))

    def close(self, timeout_s: float | None = None) -> None:
        """Writes what waits, and ends. What is not written in time is lost: the next start ends such a swap's entry.

        Args:
            timeout_s: how long that may take, seconds; longer than a store is waited for by default.
        """
        last = self._writer.submit(lambda: None)
        self._writer.shutdown(wait=False)
        try:
            last.result(_CLOSE_S if timeout_s is None else timeout_s)
        except TimeoutError:
            self._gave_up.set()
            self._writer.shutdown(wait=False, cancel_futures=True)
            log.error("the ends of %d swaps were not written in time; the next start does", len(self._unwritten))

    def _write_end(self, swap_id: int, result: SwapResult) -> None:
        if self._write(lambda: end_swap(self._store, swap_id, result)):
            self._unwritten.pop(swap_id, None)

    def _write(self, write: Callable[[], None], attempts: int | None = None) -> bool:
        """Whether it was written; without a number of attempts it is, unless the journal is closed meanwhile."""
        made, pause_s = 0, _PAUSE_S
        while True:
            try:
                write()
            except Exception:  # the boundary of this thread, which must outlive whatever keeps a store from writing
                log.exception("the journal of swaps cannot be written")
            else:
                return True
            made += 1
            if made == attempts or self._gave_up.wait(pause_s):
                return False
            if attempts is None:
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
