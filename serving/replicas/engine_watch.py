"""Notices the death of an engine: its process has ended, its core is dead, or it answers no health check.

An engine that answers no health check may be busy: vLLM's front answers all clients from one thread. So silence alone
is no death: the processor time of the front says whether it works or hangs.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from svc.engine.client import Health
from svc.engine.engine import LastingEngine
from svc.errors import EngineError

Result = TypeVar("Result")

_HEALTH_S = 2.0
_UNHEALTHY_S = 30.0
"""The front answers health checks even under load; silence for so long without work is a death."""
_BUSY_S = 300.0
"""A front that works all the time and answers nothing is left in peace for so long: it may loop for ever."""
_BUSY_SHARE = 0.05
"""Share of one processor. A working front uses more, even next to a busy core; a hanging front uses almost none."""


class EngineWatch:
    """Of the engine that a replica has at the moment.

    Args:
        engine: that one; raises RuntimeError where there is none.
    """

    def __init__(self, engine: Callable[[], LastingEngine]) -> None:
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
        answered, front = time.monotonic(), _Front(engine)
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
                works = front.works()
                if health is not Health.BAD:
                    answered = time.monotonic()
                elif (silent_s := time.monotonic() - answered) >= (_BUSY_S if works else _UNHEALTHY_S):
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


class _Front:
    """The process of an engine that answers HTTP."""

    def __init__(self, engine: LastingEngine) -> None:
        self._engine = engine
        self._at, self._used_s = time.monotonic(), engine.front_s()

    def works(self) -> bool:
        """Return whether it has worked since the last call; False if that cannot be known."""
        before, before_s = self._at, self._used_s
        self._at, self._used_s = time.monotonic(), self._engine.front_s()
        if before_s is None or self._used_s is None:
            return False
        return self._used_s - before_s >= _BUSY_SHARE * (self._at - before)
