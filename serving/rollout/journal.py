"""Writes swaps into the store from one thread, in order, so that neither the event loop nor a swap waits for a disk."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from svc.store.desired import Desired
from svc.store.swaps import SwapResult, add_step, begin_swap, end_swap

log = logging.getLogger(__name__)

_ATTEMPTS = 5
_PAUSE_S = 1.0


class Journal:
    """The server's pen for the journal of swaps."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")

    async def begin(self, desired: Desired) -> int:
        """Writes that a swap has begun; returns its id.

        Raises:
            SQLAlchemyError: the store does not take it; a swap that nobody can follow is not begun.
        """
        return await asyncio.get_running_loop().run_in_executor(self._writer, begin_swap, self._store, desired)

    def step(self, swap_id: int, text: str) -> None:
        """Adds a step, soon."""
        log.info("swap %d: %s", swap_id, text)
        self._soon(lambda: add_step(self._store, swap_id, text))

    def end(self, swap_id: int, result: SwapResult) -> None:
        """Writes how it ended, soon, and after all its steps."""
        log.info("swap %d: %s", swap_id, result.outcome)
        self._soon(lambda: end_swap(self._store, swap_id, result))

    def _soon(self, write: Callable[[], None]) -> None:
        self._writer.submit(_write, write)


def _write(write: Callable[[], None]) -> None:
    for _ in range(_ATTEMPTS):
        try:
            write()
        except SQLAlchemyError:
            log.exception("the journal of swaps cannot be written")
            time.sleep(_PAUSE_S)
        else:
            return
