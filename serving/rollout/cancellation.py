"""Cancels a running swap when a different version is desired.

The swap checks for cancellation wherever it can stop safely. Cancelling its task from outside could
interrupt a reload, after which the engine's weights would be unknown.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from serving.engines.pool import EnginePool
from serving.engines.replica import Replica

Result = TypeVar("Result")


class SupersededError(Exception):
    """Raised to stop a swap, because a version other than its target is now desired.

    The swap then stops, and the previous version remains in production.
    """


class Cancellation:
    """Lets other code cancel a swap, and records the reason."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._reason = ""

    def ask(self, reason: str) -> None:
        """Request the cancellation. If it is requested more than once, the first reason is kept."""
        if not self._asked.is_set():
            self._reason = reason
        self._asked.set()

    def check(self) -> None:
        """Stop the swap at this point if cancellation was requested.

        Raises:
            SupersededError: cancellation was requested.
        """
        if self._asked.is_set():
            raise SupersededError(self._reason)

    async def outcome_of(self, work: "asyncio.Task[Result]") -> Result:
        """Wait until a task finishes or cancellation is requested, whichever comes first, and return the task's result.

        The task itself is not cancelled.

        Raises:
            SupersededError: cancellation was requested first.
        """
        async with meanwhile(self._asked.wait()) as asked:
            await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            self.check()
        return work.result()

    async def interrupting(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` and return its result, cancelling it if cancellation is requested before it finishes.

        Raises:
            SupersededError: cancellation was requested before `work` finished.
        """
        async with meanwhile(work) as working:
            return await self.outcome_of(working)

    async def pause(self, seconds: float) -> None:
        """Wait for the given time.

        Raises:
            SupersededError: cancellation was requested before the time had passed.
        """
        await self.interrupting(asyncio.sleep(seconds))

    @asynccontextmanager
    async def holding(self, pool: EnginePool, *engines: Replica) -> AsyncIterator[None]:
        """Wait for any engine startups to finish, then hold the right to change the engines during the `with` block.

        Raises:
            SupersededError: cancellation was requested before the right was obtained.
        """
        async with AsyncExitStack() as stack:
            await self.interrupting(stack.enter_async_context(pool.held(*engines)))
            yield


@asynccontextmanager
async def meanwhile(work: Coroutine[Any, Any, Result]) -> "AsyncIterator[asyncio.Task[Result]]":
    """Run `work` in a task during the `with` block, then cancel the task and wait for its end."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
