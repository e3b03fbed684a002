"""The engines behind one model name: which of them takes a request, which is being changed, which ends.

Who takes requests is who is ready; admission is told when that becomes nobody. Knows neither HTTP nor what a version is
made of, and decides about no engine's fate: that is the reconciler's.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import httpx

from serving.admission import Admission, EngineUnavailableError
from serving.engines.replica import LoadedWeights, Replica
from serving.engines.transport import EngineDiedError
from serving.router import Router
from serving.telemetry.engine_metrics import EngineSource
from serving.telemetry.metrics import GatewayMetrics
from svc.engine.state import EngineState
from svc.version import Target

log = logging.getLogger(__name__)

_CHANGING = {EngineState.DRAINING, EngineState.SWAPPING}
_RETRY_S = 30.0
_DOWN = {EngineState.FAILED, EngineState.STOPPED}


@dataclass(frozen=True, slots=True)
class Lease:
    """An engine for one request.

    Attributes:
        http: a client whose base URL is the engine.
        served: the version that it holds.
    """

    http: httpx.AsyncClient
    served: Target


class Orphans(Protocol):
    """What an earlier server left running."""

    def numbers(self) -> list[int]:
        """The numbers of its engines that may run still; reads the disk."""

    def end(self, number: int) -> None:
        """Ends one; takes some seconds."""


class EnginePool:
    """A fixed number of members, and now and then an engine that comes to take a member's place, or that was replaced.

    Args:
        make: a replica from its number and what shall hear its changes; none of another engine has the
            number.
        orphans: the engines that an earlier server left running.
        size: how many members.
        retire_timeout_s: how long a replaced engine is kept for the requests that run in it.
    """

    def __init__(
        self,
        make: Callable[[int, Callable[[Replica], None]], Replica],
        *,
        orphans: Orphans,
        size: int,
        admission: Admission,
        router: Router,
        metrics: GatewayMetrics,
        retire_timeout_s: float,
    ) -> None:
        self._make = make
        self._orphans = orphans
        self._admission = admission
        self._router = router
        self._metrics = metrics
        self._retire_timeout_s = retire_timeout_s
        self._others: list[Replica] = []
        self._watches: dict[Replica, asyncio.Task[None]] = {}
        self._retirements: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._primary: Replica | None = None
        self.restarts = 0
        self.members = [make(number, self._on_change) for number in range(size)]

    @property
    def all(self) -> list[Replica]:
        """Members, and those that come or go."""
        return [*self.members, *self._others]

    @property
    def ready(self) -> list[Replica]:
        """Members that take requests."""
        return [member for member in self.members if member.state is EngineState.READY]

    @property
    def alive(self) -> list[Replica]:
        """Members that have an engine and are not known to be dead."""
        return [member for member in self.members if member.has_engine and member.state not in _DOWN]

    @property
    def retiring(self) -> bool:
        """Whether engines that were replaced still answer."""
        return any(engine.state is EngineState.RETIRING for engine in self._others)

    @property
    def primary(self) -> Replica | None:
        """The first that takes requests: the server's own requests go there."""
        return next(iter(self.ready), None)

    @property
    def weights(self) -> LoadedWeights:
        """What the primary holds; where none takes requests, what the first member held last."""
        return (self.primary or self.members[0]).weights

    @property
    def state(self) -> EngineState:
        """Of the engines together: the best that one of them is in."""
        states = {member.state for member in self.members}
        order = (EngineState.READY, EngineState.SWAPPING, EngineState.DRAINING, EngineState.STARTING)
        return next((state for state in order if state in states), self.members[0].state)

    @contextmanager
    def lease(self, model: str, *, without: Lease | None = None) -> Iterator[Lease]:
        """An engine for a request, the one in which the fewest run, for the body.

        Args:
            model: a client's name for what it wants.
            without: another one than this.

        Raises:
            ModelNotFoundError: nothing loaded answers to it.
            EngineUnavailableError: no engine takes requests now.
        """
        wanted = self._router.resolve(model)
        able = [(engine, engine.target) for engine in self.ready if not engine.suspected]
        able = [(engine, served) for engine, served in able if served and wanted in (None, served.version)]
        if without is not None:
            able = [(engine, served) for engine, served in able if engine.http is not without.http]
        if not able:
            raise EngineUnavailableError("no engine takes requests now", todo="send the request again later")
        engine, served = min(able, key=lambda pair: pair[0].running)
        assert served is not None  # noqa: S101 - chosen so
        with engine.occupied():
            try:
                yield Lease(engine.http, served)
            except EngineDiedError:
                engine.suspect()
                raise

    def sources(self) -> list[EngineSource]:
        """The engines whose metrics can be asked for, those that were replaced among them."""
        engines = [(engine, engine.target) for engine in self.all]
        return [EngineSource(engine.http, served, engine.replica) for engine, served in engines if served]

    def add(self) -> Replica:
        """A new engine, unstarted, to `replace` a member with, or to `drop`."""
        engine = self._make(self._free_number(), self._on_change)
        self._others.append(engine)
        return engine

    def _free_number(self) -> int:
        taken = {engine.replica for engine in self.all}
        return next(number for number in itertools.count() if number not in taken)

    async def drop(self, engine: Replica) -> None:
        """Ends an engine that is no member."""
        await engine.stop()
        self._others.remove(engine)
        self._show()

    def replace(self, old: Replica, new: Replica) -> None:
        """Puts a ready engine in a member's place, between two requests; the old one ends after its last request."""
        self._others.remove(new)
        self.members[self.members.index(old)] = new
        self._others.append(old)
        old.enter(EngineState.RETIRING)
        self._on_change(new)
        task = asyncio.create_task(self._retire(old))
        self._retirements.add(task)
        task.add_done_callback(self._retirements.discard)

    async def adopt(self, target: Target) -> bool:
        """Adopts the engines with a version that an earlier server left running, and then ends all others of it.

        Returns:
            Whether there was one; where not, only those were ended that failed the verification.
        """
        taken: list[Replica] = []
        for number in await asyncio.to_thread(self._orphans.numbers):
            if len(taken) < len(self.members):
                engine = self._make(number, self._on_change)
                self._others.append(engine)  # where `stop` finds it, should this be cut off
                try:
                    adopted = await engine.adopt(target)
                except Exception:
                    self._others.remove(engine)
                    raise
                if adopted:
                    taken.append(engine)
                else:
                    self._others.remove(engine)
        if not taken:
            return False
        self._others = [engine for engine in self._others if engine not in taken]
        size, self.members = len(self.members), taken
        await self.end_orphans()
        while len(self.members) < size:
            self.members.append(self._make(self._free_number(), self._on_change))
        self._show()
        return True

    async def end_orphans(self) -> None:
        """Ends what an earlier server left running and is no member."""
        members = {engine.replica for engine in self.members if engine.has_engine}
        for number in await asyncio.to_thread(self._orphans.numbers):
            if number not in members:
                await asyncio.to_thread(self._orphans.end, number)

    @property
    def down(self) -> list[Replica]:
        """Members that have no engine that works: it died, or was never started."""
        return [member for member in self.members if member.state in _DOWN]

    async def changed(self, timeout_s: float | None) -> None:
        """Returns when an engine has changed its state since the last return, or after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        self._changed.clear()

    def count_restart(self) -> None:
        """Counts a start after a death."""
        self.restarts += 1
        self._metrics.engine_restarted()

    async def stop(self, *, leave: bool = False) -> None:
        """Ends all engines, also those of an earlier server that were not adopted yet.

        Args:
            leave: those that are ready go on without us, for a server that starts later.
        """
        for task in [*self._watches.values(), *self._retirements]:
            task.cancel()
        ready = {engine for engine in self.all if leave and engine.state is EngineState.READY}
        await asyncio.gather(*(engine.leave() if engine in ready else engine.stop() for engine in self.all))
        if not leave:
            await self.end_orphans()

    async def _retire(self, engine: Replica) -> None:
        try:
            await engine.drained(self._retire_timeout_s)
        except TimeoutError:
            log.warning(
                "replica %d: %d requests are cut off after %g s", engine.replica, engine.running, self._retire_timeout_s
            )
        while True:
            try:
                await self.drop(engine)
            except Exception:  # it may run still, and so its number stays taken
                log.exception("replica %d cannot be ended; trying again in %g s", engine.replica, _RETRY_S)
                await asyncio.sleep(_RETRY_S)
            else:
                return

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
            why = await engine.died()
        except Exception as error:  # what cannot be watched must not be trusted
            log.exception("replica %d cannot be watched", engine.replica)
            why = repr(error)
        log.error("replica %d died: %s", engine.replica, why)
        engine.why = why
        engine.enter(EngineState.FAILED)

    def _show(self) -> None:
        """Shows to admission, names and metrics what has changed."""
        self._metrics.engine_states([engine.state for engine in self.all])
        ready = self.ready
        if ready:
            drained = [member for member in self.members if member.state is EngineState.DRAINING]
            self._router.set_loaded({engine.target for engine in [*ready, *drained] if engine.target})
            self._admission.available()
        else:
            self._admission.unavailable(_why_none({member.state for member in self.members}))
        if self.primary is not self._primary:
            self._primary = self.primary
            self._admission.end_background_slot()


def _why_none(states: set[EngineState]) -> str | None:
    """Why no engine takes requests, for clients; None where the last one is being changed."""
    if states & _CHANGING:
        return None
    if EngineState.STARTING in states:
        return "the engine is starting"
    return f"the engine has {EngineState.FAILED if EngineState.FAILED in states else EngineState.STOPPED}"
