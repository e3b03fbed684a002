"""Ends a model's engines when nobody has asked for a while, and starts one again with the next request.

That request waits, and is not refused. What is saved is memory and, on a GPU, the device; a start takes as long as any.
An engine that can sleep does that and is not ended: it keeps its process, and its weights in the machine's memory.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from serving.admission.admission import Admission
from serving.replicas.pool import EnginePool
from serving.replicas.replica import Replica
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
        idle_s: how long nobody has asked, seconds; None: its engines are never ended, and never sleep.
        promoting: whether a swap is planned or under way; the engines do not idle then.
        make_room: has other idle models give way where this one's would find no memory.
        on_error: hears why an engine did not come back.
    """

    def __init__(
        self,
        pool: EnginePool,
        admission: Admission,
        metrics: DeploymentMetrics,
        *,
        target: Callable[[], Target],
        idle_s: float | None,
        promoting: Callable[[], bool],
        make_room: Callable[[], Awaitable[None]],
        on_error: Callable[[str], None],
    ) -> None:
        self._pool = pool
        self._admission = admission
        self._metrics = metrics
        self._target = target
        self._idle_s = idle_s
        self._promoting = promoting
        self._make_room = make_room
        self._on_error = on_error
        self._asleep = asyncio.Event()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        tasks = [asyncio.create_task(part) for part in (self._watch(), self._wake_again_and_again())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def idle_s(self) -> float | None:
        """How long nobody has asked, seconds; None where its engines may not be ended now."""
        if self._idle_s is None or self._promoting() or not self._pool.ready or self._pool.has_others:
            return None
        return self._admission.idle_s if self._admission.idle_s > 0 else None

    async def sleep(self) -> bool:
        """Has its engines sleep, or ends them, unless somebody asks or they are being changed; whether it did.

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
            log.info("%s: nobody asks, its engines sleep or are ended", self._target())
            rests = await asyncio.gather(*(self._rest(member) for member in members))
        return all(rests)

    async def end_asleep(self) -> bool:
        """Ends its engines that sleep, and hold some of the GPU still, unless they are being woken; whether it did."""
        members = [member for member in self._pool.members if member.asleep]
        if not members or self._promoting() or any(member.lock.locked() for member in self._pool.members):
            return False
        async with AsyncExitStack() as stack:
            for member in members:
                await stack.enter_async_context(self._pool.held(member))
            ends = await asyncio.gather(*(self._end(member) for member in members))
        return all(ends)

    async def _rest(self, member: Replica) -> bool:
        if member.capabilities and member.capabilities.sleeps:
            try:
                await member.sleep()
            except Exception:  # whatever it was, it may be half asleep
                log.warning("replica %d does not sleep, and is ended", member.replica, exc_info=True)
            else:
                return True
        return await self._end(member)

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

    async def _wake_again_and_again(self) -> None:
        while True:
            await self._asleep.wait()
            await self._wake()

    async def _wake(self) -> None:
        """Brings engines back for the first request that waits; or does nothing where a promotion has started one."""
        await self._wanted()
        began = time.monotonic()
        try:
            async with AsyncExitStack() as stack:
                for member in self._pool.members:
                    await stack.enter_async_context(self._pool.held(member))
                if not self._pool.ready:
                    await self._try_to_make_room()
                    await self._bring_back(began)
        finally:
            self._asleep.clear()
            self._admission.wake()
            for member in self._pool.members:
                if member.state is EngineState.IDLE:
                    member.enter(EngineState.STOPPED)  # which the reviver starts

    async def _bring_back(self, began: float) -> None:
        """Wakes all that sleep; where none of them takes requests then, starts the first."""
        for member in self._pool.members:
            none_ready = not self._pool.ready
            if member.asleep and await self._woke(member) and none_ready:
                self._metrics.woke(time.monotonic() - began)
        if self._pool.ready:
            return
        if error := await start_engine(self._pool.members[0], self._target()):
            self._on_error(error)
        else:
            self._metrics.woke(time.monotonic() - began)

    async def _woke(self, member: Replica) -> bool:
        try:
            await member.wake(self._target())
        except Exception:  # whatever it was, a new engine may do better
            log.warning("replica %d does not wake, and is started again", member.replica, exc_info=True)
            return False
        return True

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
