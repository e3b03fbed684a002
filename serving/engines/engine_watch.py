"""Detects that an engine has died: its process exited, its core is dead, or it fails its health checks.

An engine that does not respond to health checks may just be busy: vLLM's API server answers all clients
from one thread. A missing response therefore does not prove that the engine is dead; the API server's CPU time shows
whether the API server is working or has hung.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from svc.engine.client import Health
from svc.engine.engine import LastingEngine
from svc.errors import EngineError

Result = TypeVar("Result")

_HEALTH_S = 2.0
_UNHEALTHY_S = 30.0
"""Seconds without a health check response or CPU use after which an engine is considered dead. Even under
load, a working API server responds sooner."""
_BUSY_S = 300.0
"""Seconds without a health check response after which an engine is considered dead even though its API server
uses CPU. The API server is then assumed to be in an endless loop."""
_BUSY_SHARE = 0.05
"""Share of one CPU core above which an API server is considered to be working. A working API server exceeds this share
even when the engine core is busy, whereas a hung API server does not."""


class EngineWatch:
    """Watches a replica's current engine for signs that it has died.

    Args:
        engine: function that returns the engine, or raises RuntimeError if there is none.
    """

    def __init__(self, engine: Callable[[], LastingEngine]) -> None:
        self._engine = engine
        self._suspected = asyncio.Event()

    @property
    def suspected(self) -> bool:
        """Whether a request found the engine dead and no health check has been made since."""
        return self._suspected.is_set()

    def suspect(self) -> None:
        """Report that a request found the engine dead. No requests are routed to it until its health is checked."""
        self._suspected.set()

    def clear(self) -> None:
        """Reset `suspected`, because a request that failed before the engine was ready says nothing about it now."""
        self._suspected.clear()

    async def died(self) -> str:
        """Wait until the engine dies, and return the reason."""
        engine = self._engine()
        ended = asyncio.create_task(engine.wait())
        answered, front = time.monotonic(), _Front(engine)
        try:
            while True:
                suspicion = asyncio.create_task(self._suspected.wait())
                try:
                    await asyncio.wait({ended, suspicion}, timeout=_HEALTH_S, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    suspicion.cancel()
                if ended.done():
                    return f"it exited with code {ended.result()}"
                health = await engine.client.health()
                self._suspected.clear()
                if health is Health.DEAD:
                    return "its core is dead, or the API server refuses connections"
                works = front.works()
                if health is not Health.BAD:
                    answered = time.monotonic()
                elif (silent_s := time.monotonic() - answered) >= (_BUSY_S if works else _UNHEALTHY_S):
                    return f"it has not answered health checks for {silent_s:.0f} s"
        finally:
            ended.cancel()

    async def while_alive(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Send a request to the engine, and fail if the engine dies before the request completes.

        If the core dies, vLLM's API server waits for the core's pending responses before it exits. These never
        arrive, so a request without this check would wait forever.

        Raises:
            EngineError: the engine died before the request completed.
        """
        working, dying = asyncio.create_task(work), asyncio.create_task(self.died())
        try:
            await asyncio.wait({working, dying}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise EngineError(f"the engine died: {dying.result()}", todo="check the engine's log")
            return working.result()
        finally:
            for task in (working, dying):
                task.cancel()
            await asyncio.gather(working, dying, return_exceptions=True)


class _Front:
    """The API server process of an engine."""

    def __init__(self, engine: LastingEngine) -> None:
        self._engine = engine
        self._at, self._used_s = time.monotonic(), engine.front_s()

    def works(self) -> bool:
        """Return whether the process has used CPU time since the last call, or False if its CPU time cannot be read."""
        before, before_s = self._at, self._used_s
        self._at, self._used_s = time.monotonic(), self._engine.front_s()
        if before_s is None or self._used_s is None:
            return False
        return self._used_s - before_s >= _BUSY_SHARE * (self._at - before)
