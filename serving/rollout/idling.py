"""Ends a model's engines when nobody has asked for a while, and starts one again with the next request.

That request waits, and is not refused. What is saved is memory and, on a GPU, the device; a start takes as long as any.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from serving.admission.admission import Admission
from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.rollout.reviver import start_engine
from serving.telemetry.deployment_metrics import DeploymentMetrics
from svc.engine.state import EngineState
from svc.errors import SvcError
from svc.version import Target

log = logging.getLogger(__name__)

_LONGEST_LOOK_S = 1.0


class Idling:
    """Of one model.

    Args:
        target: what an engine is started with.
        idle_s: how long nobody has asked, seconds; None: its engines are never ended.
        make_room: ends the engines of other idle models where this one's would find no memory.
        on_error: hears why an engine did not start again.
    """

    def __init__(
        self,
        pool: EnginePool,
        admission: Admission,
        metrics: DeploymentMetrics,
        *,
        target: Callable[[], Target],
        idle_s: float | None,
        make_room: Callable[[], Awaitable[None]],
        on_error: Callable[[str], None],
    ) -> None:
        self._pool = pool
        self._admission = admission
        self._metrics = metrics
        self._target = target
        self._idle_s = idle_s
        self._make_room = make_room
        self._on_error = on_error
        self._asleep = asyncio.Event()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        watching = asyncio.create_task(self._watch())
        try:
            while True:
                await self._asleep.wait()
                await self._wake()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    @property
    def idle_s(self) -> float | None:
        """How long nobody has asked, seconds; None where its engines may not be ended now."""
        may_end = self._idle_s is not None and self._pool.ready and not self._pool.has_others
        return self._admission.idle_s if may_end and self._admission.idle_s > 0 else None

    async def sleep(self) -> bool:
        """Ends its engines, unless somebody asks meanwhile or they are being changed; whether it did.

        One that cannot be ended is tried again before it is started again.
        """
        members = self._pool.members
        if any(member.lock.locked() for member in members):
            return False
        async with AsyncExitStack() as stack:
            for member in members:
                await stack.enter_async_context(self._pool.held(member))
            if self.idle_s is None:
                return False
            # Between two requests, and before anything is waited for: who comes now is queued, and wakes it.
            self._admission.sleep()
            for member in members:
                member.enter(EngineState.IDLE)
            self._asleep.set()
            log.info("%s: nobody asks, its engines are ended", self._target())
            ends = await asyncio.gather(*(self._end(member) for member in members))
        return all(ends)

    async def _end(self, member: Replica) -> bool:
        try:
            await member.stop(EngineState.IDLE)
        except Exception:  # whatever it was, the model is asked again some day, and others go on
            log.exception("replica %d cannot be ended", member.replica)
            return False
        return True

    async def _watch(self) -> None:
        if self._idle_s is None:
            return
        while True:
            idle_s = self.idle_s or 0.0
            if idle_s >= self._idle_s:
                await self.sleep()
            await asyncio.sleep(min(_LONGEST_LOOK_S, max(self._idle_s - idle_s, self._idle_s / 10)))

    async def _wake(self) -> None:
        """Starts an engine for the first request that waits; or does nothing where a promotion has started one."""
        await self._wanted()
        began = time.monotonic()
        try:
            first = self._pool.members[0]
            async with self._pool.held(first):
                if not self._pool.ready:
                    await self._try_to_make_room()
                    if error := await start_engine(first, self._target()):
                        self._on_error(error)
                    else:
                        self._metrics.woke(time.monotonic() - began)
        finally:
            self._asleep.clear()
            self._admission.wake()
            for member in self._pool.members:
                if member.state is EngineState.IDLE:
                    member.enter(EngineState.STOPPED)  # which the reviver starts

    async def _try_to_make_room(self) -> None:
        try:
            await self._make_room()
        except SvcError as error:  # an estimate; the start finds out
            log.warning("%s starts all the same: %s", self._target(), error.wrong)

    async def _wanted(self) -> None:
        """Returns when a request waits, or an engine was started for something else."""
        while not self._pool.ready:
            wanted = asyncio.create_task(self._admission.queue.wanted())
            try:
                done, _ = await asyncio.wait({wanted}, timeout=_LONGEST_LOOK_S)
            finally:
                wanted.cancel()
            if done:
                return
