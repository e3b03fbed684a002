"""Stops a model's engines after a period without requests, and starts an engine for the next request.

The next request is queued rather than rejected. Idling frees memory and, with a GPU, the device, but a
stopped engine starts as slowly as any other. An engine that can sleep does so instead of stopping: it keeps
its process running and its weights in the host's memory.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.rollout.cancellation import meanwhile
from serving.rollout.reviver import start_engine
from svc.engine.state import EngineState
from svc.errors import SvcError
from svc.version import Target

log = logging.getLogger(__name__)

_MAX_CHECK_INTERVAL_S = 1.0


@dataclass(eq=False)
class Idling:
    """Stops and wakes one model's engines.

    Attributes:
        target: function that returns the version to start an engine with.
        timeout_s: idle time after which engines stop or sleep, in seconds. None means never.
        promoting: function that returns whether a swap or a rollout is in progress. During either, the
            engines are kept running.
        rolling_out: function that returns whether a rollout is in progress. A rollout needs the production version, so
            idle engines are started for it.
        make_room: function that stops the engines of other idle models if this model's engines would not fit
            into memory.
        on_error: function called with the reason why an engine could not be started again.
    """

    pool: EnginePool
    target: Callable[[], Target]
    timeout_s: float | None
    promoting: Callable[[], bool]
    rolling_out: Callable[[], bool]
    make_room: Callable[[], Awaitable[None]]
    on_error: Callable[[str], None]
    _asleep: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def run(self) -> None:
        """Stop and wake the engines as needed, until this task is cancelled."""
        async with meanwhile(self._watch()) as watching, meanwhile(self._wake_repeatedly()) as waking:
            await asyncio.gather(watching, waking)

    @property
    def idle_s(self) -> float | None:
        """Seconds since the last request, or None if the engines must not be stopped now."""
        if self.timeout_s is None or self.promoting() or not self.pool.ready or self.pool.others:
            return None
        if self.pool.admission.batch_slots.busy:
            return None
        return self.pool.admission.idle_s if self.pool.admission.idle_s > 0 else None

    async def sleep(self) -> bool:
        """Put the engines to sleep or stop them. Return whether all of them are now asleep or stopped.

        Does nothing while requests are running or an engine is being started, stopped or swapped. If an engine cannot
        be stopped, another attempt is made before the engine is started again.
        """
        members = self.pool.members
        if any(member.lock.locked() for member in members):
            return False
        async with self.pool.held(*members):
            if self.idle_s is None:
                return False
            # Without awaiting since the check above: a request that arrives now is queued, and wakes the model.
            self.pool.admission.sleep()
            for member in members:
                member.enter(EngineState.IDLE)
            self._asleep.set()
            log.info("%s: no requests; stopping its engines or putting them to sleep", self.target())
            rests = await asyncio.gather(*(self._rest(member) for member in members))
        return all(rests)

    async def end_asleep(self) -> bool:
        """Stop the engines that are asleep, because they still use some GPU memory. Return whether all have stopped.

        Does nothing while an engine is waking up.
        """
        members = [member for member in self.pool.members if member.asleep]
        if not members or self.promoting() or any(member.lock.locked() for member in self.pool.members):
            return False
        async with self.pool.held(*members):
            ends = await asyncio.gather(*(self._end(member) for member in members))
        return all(ends)

    async def _rest(self, member: Replica) -> bool:
        if member.capabilities and member.capabilities.sleeps:
            try:
                await member.sleep()
            except Exception:  # any error: it may be half asleep
                log.warning("could not put replica %d to sleep; stopping it", member.replica, exc_info=True)
            else:
                return True
        return await self._end(member)

    async def _end(self, member: Replica) -> bool:
        try:
            await member.stop(EngineState.IDLE)
        except Exception:  # any error: the next request tries again, and other models continue
            log.exception("could not stop replica %d", member.replica)
            return False
        return True

    async def _watch(self) -> None:
        while (timeout_s := self.timeout_s) is not None:
            idle_s = self.idle_s or 0.0
            if idle_s >= timeout_s:
                await self.sleep()
            await asyncio.sleep(min(_MAX_CHECK_INTERVAL_S, max(timeout_s - idle_s, timeout_s / 10)))

    async def _wake_repeatedly(self) -> None:
        while True:
            await self._asleep.wait()
            await self._wake()

    async def _wake(self) -> None:
        """Start or wake engines when the first request is queued, unless a promotion has already started an engine."""
        await self._wanted()
        began = time.monotonic()
        try:
            async with self.pool.held(*self.pool.members):
                if not self.pool.ready:
                    await self._try_to_make_room()
                    await self._bring_back(began)
        finally:
            self._asleep.clear()
            self.pool.admission.wake()
            for member in self.pool.members:
                if member.state is EngineState.IDLE:
                    member.enter(EngineState.STOPPED)  # the reviver starts it

    async def _bring_back(self, began: float) -> None:
        """Wake all sleeping engines. If no engine accepts requests afterwards, start the pool's first engine."""
        for member in self.pool.members:
            none_ready = not self.pool.ready
            if member.asleep and await self._woke(member) and none_ready:
                self.pool.metrics.woke(time.monotonic() - began)
        if self.pool.ready:
            return
        if error := await start_engine(self.pool.members[0], self.target()):
            self.on_error(error)
        else:
            self.pool.metrics.woke(time.monotonic() - began)

    async def _woke(self, member: Replica) -> bool:
        try:
            await member.wake(self.target())
        except Exception:  # any error: a new engine may work
            log.warning("could not wake replica %d; restarting it", member.replica, exc_info=True)
            return False
        return True

    async def _try_to_make_room(self) -> None:
        try:
            await self.make_room()
        except SvcError as error:  # only an estimate: the start shows whether memory suffices
            log.warning("could not free memory for %s; starting it anyway: %s", self.target(), error.wrong)

    async def _wanted(self) -> None:
        """Wait until a request is queued, a batch request is waiting, a rollout is in progress, or an engine was
        started for another reason.
        """
        while not (self.pool.ready or self.rolling_out() or self.pool.admission.batch_slots.wanted):
            with suppress(TimeoutError):
                async with asyncio.timeout(_MAX_CHECK_INTERVAL_S):
                    await self.pool.admission.queue.wanted()
                    return
