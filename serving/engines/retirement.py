"""Stops unneeded engines in the background, either after their last request or while they are starting."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from serving.engines.replica import Replica

log = logging.getLogger(__name__)

RETIRE_TIMEOUT_S = 3600.0
"""Longest time that a replaced engine is kept running to finish its requests, in seconds. No answer takes this
long. The engine uses memory until it stops."""
_RETRY_S = 30.0


class Retirement:
    """Stops engines that have left a pool, or never became members of it.

    Args:
        drop: function that stops an engine.
    """

    def __init__(self, drop: Callable[[Replica], Awaitable[None]]) -> None:
        self._drop = drop
        self._endings: set[asyncio.Task[None]] = set()
        self._cut_starts: set[asyncio.Task[Any]] = set()

    @property
    def under_way(self) -> bool:
        """Whether any engines still have to be stopped."""
        return bool(self._endings)

    def after_requests(self, engine: Replica) -> None:
        """Stop a replaced engine in the background when all of its requests have ended, or after `RETIRE_TIMEOUT_S` at
        the latest.
        """
        self._later(self._end_drained(engine))

    def after_start(self, engine: Replica, starting: asyncio.Task[Any]) -> None:
        """Cancel an engine's startup and stop the engine. This runs in the background, because stopping takes seconds.

        Args:
            starting: the task that starts the engine.
        """
        starting.cancel()
        self._cut_starts.add(starting)
        starting.add_done_callback(self._forget_start)
        self._later(self._end_started(starting, engine))

    async def cut_off(self) -> None:
        """Cancel the background tasks. Call this before stopping all engines.

        Waits for the cancelled engine startups to finish.
        """
        for task in self._endings:
            task.cancel()
        if self._cut_starts:  # they stop their engines themselves
            await asyncio.wait(self._cut_starts)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    def _forget_start(self, start: asyncio.Task[Any]) -> None:
        self._cut_starts.discard(start)
        if not start.cancelled() and start.exception():
            log.info("an engine startup failed after it had been cancelled", exc_info=start.exception())

    async def _end_drained(self, engine: Replica) -> None:
        try:
            await engine.drained(RETIRE_TIMEOUT_S)
        except TimeoutError:
            log.warning(
                "replica %d: cancelling %d requests that are still running after %g s",
                engine.replica,
                engine.running,
                RETIRE_TIMEOUT_S,
            )
        await self._end(engine)

    async def _end_started(self, starting: asyncio.Task[Any], engine: Replica) -> None:
        await asyncio.wait({starting})  # not cancelled with this task, because it stops its engine
        await self._end(engine)

    async def _end(self, engine: Replica) -> None:
        while True:
            try:
                await self._drop(engine)
            except Exception:  # it may still run, and so its number stays taken
                log.exception("could not stop replica %d; retrying in %g s", engine.replica, _RETRY_S)
                await asyncio.sleep(_RETRY_S)
            else:
                return
