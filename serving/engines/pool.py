"""Tracks the engines behind one model name: which of them accept requests, are being changed or are stopping.

Ready engines accept requests, and admission is notified when no engine is ready. This module does not depend on HTTP or
on the contents of a version, and leaves decisions about engines to the reconciler.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from serving.admission.admission import Admission
from serving.engines.model_names import ModelNames
from serving.engines.replica import NO_WEIGHTS, LoadedWeights, Replica
from serving.engines.retirement import Retirement
from serving.engines.slots import EngineSlots
from serving.telemetry.deployment_metrics import DeploymentMetrics
from serving.telemetry.engine_metrics import EngineSource
from svc.engine.state import EngineState
from svc.version import Format, Target, VersionId

log = logging.getLogger(__name__)

_CHANGING = {EngineState.DRAINING, EngineState.SWAPPING}
_ASKED_FOR = _CHANGING | {EngineState.IDLE}
_READY = EngineState.READY  # looked up for each request, which is slow before Python 3.12
_DOWN = {EngineState.FAILED, EngineState.STOPPED}


@dataclass(eq=False, kw_only=True)
class EnginePool:
    """One model's engines: the members of the pool and, during a change, engines that are joining or leaving.

    Attributes:
        make: function that returns a replica, given its number and a callback for its changes.
        slots: assigns engine numbers.
        size: number of members after `fill`.
        most: maximum number of running engines to adopt.
        members: engines that accept requests when they are ready.
        others: engines that may become members, or used to be members.
        candidate: engine in `others` that runs the candidate of a rollout, or None if there is none.
        retirement: object that stops engines that are no longer needed.
        restarts: number of times that an engine was restarted because it died.
    """

    make: Callable[[int, Callable[[Replica], None]], Replica]
    slots: EngineSlots
    size: int
    most: int
    admission: Admission
    names: ModelNames
    metrics: DeploymentMetrics

    def __post_init__(self) -> None:
        self.others: list[Replica] = []
        self.candidate: Replica | None = None
        self._watches: dict[Replica, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._primary: Replica | None = None
        self.retirement = Retirement(self.drop)
        self.restarts = 0
        self.members: list[Replica] = []

    @property
    def all(self) -> list[Replica]:
        """All engines, both members and non-members."""
        return [*self.members, *self.others]

    @property
    def ready(self) -> list[Replica]:
        """Pool members that are currently accepting requests."""
        return [member for member in self.members if member.state is _READY]

    def ready_for(self, wanted: VersionId | None) -> list[Replica]:
        """Return the engines that accept requests for a version, possibly including the candidate's engine.

        Args:
            wanted: the version, or None for the version in production.
        """
        candidate = self.candidate
        if wanted is None or candidate is None or candidate.state is not _READY:
            return self.ready
        held = candidate.target
        return [*self.ready, candidate] if held and held.version == wanted else self.ready

    async def applies(self, version: VersionId) -> bool:
        """Return whether the pool's members can apply a version as an adapter to the base model that they run.

        If no member has loaded the adapter, only one member is checked, and the result is assumed to hold for all.
        """
        if any(engine.adapters and engine.adapters.has(version) for engine in self.members):
            return True
        first = self.primary or next(iter(self.members), None)
        return first is not None and await first.applies(version)

    @property
    def alive(self) -> list[Replica]:
        """Pool members with an engine, except those whose engine is known to be dead."""
        return [member for member in self.members if member.has_engine and member.state not in _DOWN]

    @property
    def starting(self) -> int:
        """Number of engines that are starting and have not yet allocated all their memory."""
        return sum(engine.state is EngineState.STARTING for engine in self.all)

    @property
    def primary(self) -> Replica | None:
        """The first engine in `members` that accepts requests. It receives the server's own requests."""
        return next(iter(self.ready), None)

    @property
    def weights(self) -> LoadedWeights:
        """Weights of the primary engine or, if no engine is ready, those most recently loaded by the first member."""
        first = self.primary or next(iter(self.members), None)
        return first.weights if first else NO_WEIGHTS

    @property
    def plan(self) -> list[dict[str, Any]] | None:
        """Options that the first member was launched with, or None if it has not been started."""
        return next((member.plan for member in self.members), None)

    @property
    def state(self) -> EngineState:
        """Combined state of the engines, which is the best state that any member is in."""
        states = {member.state for member in self.members}
        order = (EngineState.READY, EngineState.SWAPPING, EngineState.DRAINING, EngineState.STARTING)
        least = self.members[0].state if self.members else EngineState.STOPPED
        return next((state for state in order if state in states), least)

    def _on_adapter(self, seconds: float | None) -> None:
        loaded = [engine.adapters.loaded for engine in self.all if engine.adapters]
        self.metrics.adapters_loaded(sum(map(len, loaded)))
        if seconds is not None:
            self.metrics.adapter_loaded(seconds)
        self._show_loaded()

    def _show_loaded(self) -> None:
        """Publish which version names can be resolved, and how many served versions are unverified.

        Versions that run in an engine or are loaded as adapters can be resolved.
        """
        self.metrics.unverified({version for engine in self.all for version in engine.unverified})
        ready = self.ready
        drained = [member for member in self.members if member.state is EngineState.DRAINING]
        if ready:
            candidates = [engine for engine in self.others if engine is self.candidate and engine.state is _READY]
            held = {engine.target for engine in [*ready, *drained, *candidates] if engine.target}
            loaded = [adapter for engine in ready if engine.adapters for adapter in engine.adapters.loaded]
            self.names.loaded = held | {Target(adapter.version, Format.ADAPTER) for adapter in loaded}

    def sources(self) -> list[EngineSource]:
        """Return the engines whose metrics can be read, including replaced engines."""
        engines = [(engine, engine.target) for engine in self.all]
        return [EngineSource(engine.client, served, engine.replica) for engine, served in engines if served]

    def _made(self, number: int) -> Replica:
        engine = self.make(number, self._on_change)
        engine.on_adapter = self._on_adapter
        return engine

    def fill(self) -> None:
        """Create members, without starting them, until the pool has `size` members."""
        while len(self.members) < self.size:
            self.members.append(self._made(self.slots.take()))
        if self.ready:
            self._show()

    def grow(self, size: int) -> None:
        """Add members that have no engine yet. A background task (`Reviver`) then starts their engines."""
        self.size = size
        self.fill()
        self._changed.set()

    def shrink(self) -> bool:
        """Remove a member that has no working engine or, if there is none, the ready member with the fewest requests.

        The member's engine stops after its last request.

        Returns:
            Whether a member was removed. Members that are being started or changed, and the only ready member, are not
            removed.
        """
        ready = self.ready
        free = [member for member in self.members if not member.lock.locked()]
        leaving = [member for member in free if member.state in _DOWN] or [each for each in free if each in ready]
        if len(self.members) < 2 or not leaving or ready == leaving[:1]:
            return False
        engine = min(reversed(leaving), key=lambda member: member.running + member.reserved)
        self.size -= 1
        self.members.remove(engine)
        self.others.append(engine)
        engine.enter(EngineState.RETIRING)
        self.retirement.after_requests(engine)
        return True

    def add(self) -> Replica:
        """Create an engine without starting it, to be passed to `replace` or `drop` later."""
        engine = self._made(self.slots.take())
        self.others.append(engine)
        return engine

    def set_candidate(self, engine: Replica | None) -> None:
        """Set the engine that answers requests for the candidate of a rollout."""
        self.candidate = engine
        self._show_loaded()

    async def drop(self, engine: Replica) -> None:
        """Stop an engine that is not a pool member, and release its number."""
        await engine.stop()
        self.others.remove(engine)
        self.slots.give_back(engine.replica)
        self._show()

    def replace(self, old: Replica, new: Replica) -> None:
        """Replace a pool member with a ready engine, without interrupting requests.

        The old engine stops after its last request.
        """
        self.others.remove(new)
        self.members[self.members.index(old)] = new
        self.others.append(old)
        old.enter(EngineState.RETIRING)
        self._on_change(new)
        self.retirement.after_requests(old)

    async def adopt(self, target: Target, on_first: Callable[[], None]) -> bool:
        """Adopt engines that an earlier server left running with the given version, and make them pool members.

        Args:
            on_first: function called once the first engine is adopted, before it accepts requests. The remaining
                engines are adopted while it serves.

        Returns:
            Whether at least one engine was adopted. Engines that failed verification were stopped.
        """
        for number in await self.slots.orphans():
            if len(self.members) == self.most:
                break
            engine = self._made(self.slots.take(number))
            self.others.append(engine)  # so that `stop` finds it if this task is cancelled
            try:
                adopted = await engine.adopt(target)
            except Exception:
                self.others.remove(engine)
                self.slots.give_back(number)
                raise
            self.others.remove(engine)
            if adopted:
                if not self.members:
                    on_first()
                self.members.append(engine)
                self.size = max(self.size, len(self.members))
                self._show()
            else:
                self.slots.give_back(number)
        return bool(self.members)

    @property
    def down(self) -> list[Replica]:
        """Pool members without a working engine, because their engine died or was never started."""
        return [member for member in self.members if member.state in _DOWN]

    @asynccontextmanager
    async def held(self, *engines: Replica) -> AsyncIterator[None]:
        """Wait for the exclusive right to start, change or stop engines, and hold it during the `with` block."""
        try:
            async with AsyncExitStack() as stack:
                for engine in engines:
                    await stack.enter_async_context(engine.lock)
                yield
        finally:
            self._changed.set()  # an engine may be down, and free to be restarted

    async def changed(self, timeout_s: float | None) -> None:
        """Wait until an engine's state has changed since the last call, or until `timeout_s` seconds have passed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        self._changed.clear()

    def count_restart(self) -> None:
        self.restarts += 1
        self.metrics.engine_restarted()

    async def stop(self, *, leave: bool = False) -> None:
        """Stop the engines.

        Args:
            leave: whether to leave ready engines running, so that a server that starts later can adopt them.
        """
        for task in self._watches.values():
            task.cancel()
        await self.retirement.cut_off()
        ready = {engine for engine in self.all if leave and engine.state is EngineState.READY}
        await asyncio.gather(*(engine.leave() if engine in ready else engine.stop() for engine in self.all))
        for engine in self.all:
            self.slots.give_back(engine.replica)

    def _on_change(self, engine: Replica) -> None:
        watch = self._watches.pop(engine, None)
        if watch is not None:
            watch.cancel()
        if engine.state is EngineState.READY:
            self._watches[engine] = asyncio.create_task(self._watch(engine))
        self._changed.set()
        self._show()

    async def _watch(self, engine: Replica) -> None:
        try:
            why = await engine.watch.died()
        except Exception as error:  # an engine that cannot be watched counts as dead
            log.exception("could not monitor replica %d", engine.replica)
            why = repr(error)
        log.error("replica %d died: %s", engine.replica, why)
        engine.why = why
        engine.enter(EngineState.FAILED)

    def _show(self) -> None:
        """Publish the state of the engines to admission, model names and metrics.

        If the primary engine has changed, also cancel the server's own request to the previous one.
        """
        self.metrics.engine_states([engine.state for engine in self.all])
        ready = self.ready
        self._show_loaded()
        if ready:
            self.admission.available()
        else:
            self.admission.unavailable(_why_none({member.state for member in self.members}))
        if self.primary is not self._primary:
            self._primary = self.primary
            self.admission.background_slot.end()


def _why_none(states: set[EngineState]) -> str | None:
    """Return a client-facing reason why no engine accepts requests.

    Return None while an engine is being changed or started on demand.
    """
    if states & _ASKED_FOR:
        return None
    if EngineState.STARTING in states:
        return "the engine is starting"
    return f"the engine has {EngineState.FAILED if EngineState.FAILED in states else EngineState.STOPPED}"
