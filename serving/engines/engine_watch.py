"""Notices the death of an engine: its process has ended, its core is dead, or it answers no health check."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from svc.engine.engine import Engine
from svc.engine.vllm.client import Health
from svc.errors import EngineError

Result = TypeVar("Result")

_HEALTH_S = 2.0
_UNHEALTHY_S = 30.0
"""The front answers health checks even under load; half a minute without an answer is a death."""


class EngineWatch:
    """Of the engine that a replica has at the moment.

    Args:
        engine: that one; raises RuntimeError where there is none.
    """

    def __init__(self, engine: Callable[[], Engine]) -> None:
        self._engine = engine
        self._suspected = asyncio.Event()

    @property
    def suspected(self) -> bool:
        """Whether a request has found it dead, and its health was not checked since."""
        return self._suspected.is_set()

    def suspect(self) -> None:
        """A request has found it dead: its health is checked now, and it takes no more until that is known."""
        self._suspected.set()

    def clear(self) -> None:
        """What was suspected was the engine before, or before its change."""
        self._suspected.clear()

    async def died(self) -> str:
        """Returns why, when the engine has died."""
        engine = self._engine()
        ended = asyncio.create_task(engine.wait())
        answered = time.monotonic()
        try:
            while True:
                check = asyncio.create_task(self._next_check())
                try:
                    await asyncio.wait({ended, check}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    check.cancel()
                if ended.done():
                    return f"it ended with code {ended.result()}"
                health = await engine.client.health()
                self._suspected.clear()
                if health is Health.DEAD:
                    return "its core is dead, or it takes no connection any more"
                if health is not Health.BAD:
                    answered = time.monotonic()
                elif (silent_s := time.monotonic() - answered) >= _UNHEALTHY_S:
                    return f"no answer to health checks for {silent_s:.0f} s"
        finally:
            ended.cancel()

    async def unless_dead(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What we ask of the engine. vLLM's front, when its core is dead, waits for its last answers before it ends,
        and an answer of the core never comes: both would wait for each other.

        Raises:
            EngineError: it died meanwhile.
        """
        working, dying = asyncio.create_task(work), asyncio.create_task(self.died())
        try:
            await asyncio.wait({working, dying}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise EngineError(f"the engine died: {dying.result()}", todo="see the engine's log")
            return working.result()
        finally:
            for task in (working, dying):
                task.cancel()
            await asyncio.gather(working, dying, return_exceptions=True)

    async def _next_check(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_HEALTH_S):
                await self._suspected.wait()
