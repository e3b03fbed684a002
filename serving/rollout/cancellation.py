"""How a swap that is under way hears that another version is wanted.

Asked for, and heard where the swap can stop: a task that is cancelled from outside would leave an engine in the middle
of a reload, of which nobody knows what it holds.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from serving.replicas.pool import EnginePool
from serving.replicas.replica import Replica

Result = TypeVar("Result")


class SupersededError(Exception):
    """Another version is wanted: the swap ends, and the version before serves on."""


class Cancellation:
    """Of one swap; never asked for, it changes nothing."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._reason = ""

    def ask(self, reason: str) -> None:
        """From now on the swap is to end; the first reason stays."""
        if not self._asked.is_set():
            self._reason = reason
        self._asked.set()

    def check(self) -> None:
        """A place where the swap can stop.

        Raises:
            SupersededError: it is to.
        """
        if self._asked.is_set():
            raise SupersededError(self._reason)

    async def outcome_of(self, work: "asyncio.Task[Result]") -> Result:
        """What a task returns or raises; it goes on where the cancellation comes first.

        Raises:
            SupersededError: it came first.
        """
        asked = asyncio.create_task(self._asked.wait())
        try:
            await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
        if not work.done():
            self.check()
        return work.result()

    async def interrupting(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What some work returns or raises; it is ended where the cancellation comes first.

        Raises:
            SupersededError: it came first.
        """
        working = asyncio.create_task(work)
        try:
            return await self.outcome_of(working)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    @asynccontextmanager
    async def holding(self, pool: EnginePool, engines: Sequence[Replica]) -> AsyncIterator[None]:
        """In the body nobody else touches these engines; one that is being started is waited for.

        Raises:
            SupersededError: the cancellation came first.
        """
        async with AsyncExitStack() as stack:
            for engine in engines:
                await self.interrupting(stack.enter_async_context(pool.held(engine)))
            yield
