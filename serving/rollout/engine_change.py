"""Brings another version into one engine, or into one that takes its place; and back, where that fails.

In place: no new requests for it -> let the running ones end -> reload -> reset the prefix cache -> check the probes.
Where no other engine takes requests, they wait meanwhile. Blue-green: start a second engine with the version, check the
probes, put it in the place of the first, let that answer its last requests. Nobody waits, but there must be memory for
both. A version that this kind of engine has never loaded needs an engine that starts with it: a second one, or, without
memory for it, the same one again. An adapter of the same base is loaded and checked beside the requests.

A change that is superseded ends where it can: while it waits, while an engine starts, after a reload. A reload is not
cut off, because nobody would know what the engine holds.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from serving.admission.admission import Admission
from serving.model_names import ModelNames
from serving.replicas.pool import EnginePool
from serving.replicas.replica import Replica
from serving.replicas.retirement import RETIRE_TIMEOUT_S
from serving.replicas.verification import Verification
from serving.rollout.cancellation import Cancellation, SupersededError
from serving.rollout.swap_plan import Report, SwapPlanner
from svc.engine.client import DOWN
from svc.engine.state import EngineState
from svc.errors import EngineError, ProbeError, SvcError
from svc.store.swaps import SwapKind, SwapOutcome
from svc.version import Target

log = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.1

Result = tuple[SwapOutcome, str | None]
"""How it ended, and why not well."""


class RequestsRunError(EngineError):
    """Requests still run after the drain timeout; the engine serves on."""


@dataclass(slots=True)
class SwapInProgress:
    """One swap while it is under way.

    Attributes:
        kind, why, restart, reloads: see `Plan`; they change where what was planned cannot be done.
        queued_s: how long admission was closed, all in all; None while it never was.
        running: requests in the engines when it began.
        queued: most requests that waited.
    """

    current: Target
    target: Target
    kind: SwapKind
    why: str
    restart: bool
    reloads: bool
    report: Report
    cancellation: Cancellation
    running: int
    queued_s: float | None = None
    queued: int | None = None


class EngineChange:
    """Changes the version in one engine of a pool at a time.

    Args:
        drain_timeout_s: longest wait for the requests that run in an engine, in place.
    """

    def __init__(
        self,
        *,
        planner: SwapPlanner,
        verification: Verification,
        pool: EnginePool,
        admission: Admission,
        names: ModelNames,
        drain_timeout_s: float,
    ) -> None:
        self._planner = planner
        self._verification = verification
        self._pool = pool
        self._admission = admission
        self._names = names
        self._drain_timeout_s = drain_timeout_s

    async def run(self, change: SwapInProgress, engine: Replica) -> Result:
        """One engine, in place or by another that takes its place."""
        if change.kind is SwapKind.BLUEGREEN:
            return await self._blue_green(change, engine)
        if change.kind is SwapKind.ADAPTER:
            return await self._by_adapter(change, engine)
        try:
            return await self._in_place(change, engine)
        except EngineError as error:
            change.report(f"not in place: {error.wrong}")
            change.why = error.wrong
            return await self._blue_green(change, engine)
        except OSError as error:
            log.warning("%s cannot be noted for an engine", change.target, exc_info=True)
            return SwapOutcome.REFUSED, str(error)

    async def _by_adapter(self, change: SwapInProgress, engine: Replica) -> Result:
        """Loads and verifies an adapter beside the requests; then what comes next is for it."""
        try:
            found = await change.cancellation.interrupting(engine.bring(change.target))
        except SupersededError:
            raise
        except Exception as error:  # whatever it was, what serves was not touched
            log.warning("no adapter of %s", change.target, exc_info=error)
            change.report(f"failed: {_line(error)}")
            return SwapOutcome.REFUSED, str(error) or repr(error)
        change.report(f"adapter loaded: {found}")
        self._serve_if_only(change)
        return SwapOutcome.SUCCEEDED, None

    async def _blue_green(self, change: SwapInProgress, old: Replica) -> Result:
        try:
            shortage = await change.cancellation.interrupting(self._planner.shortage(change.target))
        except (SvcError, OSError) as error:
            log.warning("no second engine with %s", change.target, exc_info=True)
            return SwapOutcome.REFUSED, str(error)
        if shortage:
            change.report(f"no room for a second engine: {shortage}")
            return SwapOutcome.REFUSED, f"no room for a second engine: {shortage} ({change.why})"
        change.kind = SwapKind.BLUEGREEN
        change.report(f"starting a second engine with {change.target}")
        new = self._pool.add()
        try:
            found = await self._start_second(change, new)
        except SupersededError:
            raise
        except Exception as error:  # whatever it was, the engine that serves was not touched
            log.warning("no second engine with %s", change.target, exc_info=error)
            change.report(f"failed: {_line(error)}")
            self._pool.retirement.after_requests(new)
            return SwapOutcome.REFUSED, str(error) or repr(error)
        change.report(found)
        self._serve_if_only(change)
        self._pool.replace(old, new)
        change.report(f"requests go to it; {old.running} still run in the one before")
        return SwapOutcome.SUCCEEDED, None

    async def _start_second(self, change: SwapInProgress, new: Replica) -> str:
        """Returns what was found. Where the swap is superseded meanwhile, nobody waits for the engine's end."""
        starting = asyncio.create_task(new.start(change.target))
        try:
            found = await change.cancellation.outcome_of(starting)
            change.cancellation.check()
        except (SupersededError, asyncio.CancelledError):
            self._pool.retirement.after_start(new, starting)
            raise
        return found

    def _serve_if_only(self, change: SwapInProgress) -> None:
        """Where others still hold the version before, that one is in production until all are changed."""
        if len(self._pool.alive) <= 1:
            self._names.serve(change.target)

    async def _in_place(self, change: SwapInProgress, engine: Replica) -> Result:
        async with self._without(change, engine):
            try:
                await change.cancellation.interrupting(self._drain(engine))
                change.cancellation.check()
                await engine.clear()
            except EngineError as error:
                # Where requests run still, an engine that hangs is found by the pool, which is more patient.
                if not isinstance(error, RequestsRunError) and await engine.client.health() in DOWN:
                    return await self._replace_engine(change, engine), str(error)
                _resume(engine)
                raise
            except BaseException:
                _resume(engine)
                raise
            change.report("running requests ended")
            engine.enter(EngineState.SWAPPING)
            return await (self._restart if change.restart else self._reload)(change, engine)

    @asynccontextmanager
    async def _without(self, change: SwapInProgress, engine: Replica) -> AsyncIterator[None]:
        """Without new requests for the engine: others take them, or they wait from when there is no other."""
        try:
            async with self._admission.changing():
                engine.enter(EngineState.DRAINING)
                try:
                    if not self._pool.ready:
                        change.report(f"queueing new requests, {self._admission.running} running")
                    yield
                except BaseException:
                    # Cancelled, or a defect. Nobody knows which weights the engine holds, so nobody may reach it.
                    if engine.state is not EngineState.READY:
                        engine.enter(EngineState.FAILED)
                    raise
        finally:
            if self._admission.closed_s is not None:
                change.queued_s = (change.queued_s or 0.0) + self._admission.closed_s
                change.queued = max(change.queued or 0, self._admission.queue.most)

    async def _drain(self, engine: Replica) -> None:
        """Returns when no request runs: none that a client waits for, and none that one left behind in the engine.

        Raises:
            RequestsRunError: some still ran after the timeout.
            EngineError: the engine is gone, or still busy.
        """
        try:
            await engine.drained(self._drain_timeout_s)
        except TimeoutError:
            after = f"after {self._drain_timeout_s:g} s (serve.drain_timeout_s)"
            raise RequestsRunError(f"{engine.running} requests still ran {after}") from None
        await engine.watch.unless_dead(engine.client.reset_prefix_cache())

    async def _reload(self, change: SwapInProgress, engine: Replica) -> Result:
        try:
            await self._load(engine, change.target, change.report, change.cancellation.check)
        except SupersededError as error:
            change.report(str(error))
            outcome = await self._restore(change, engine, error)
            return SwapOutcome.CANCELLED if outcome is SwapOutcome.RESTORED else outcome, str(error)
        except Exception as error:  # whatever it was, weights that are not verified must not serve
            log.warning("%s failed after its load", change.target, exc_info=error)
            change.report(f"failed: {_line(error)}")
            return await self._restore(change, engine, error), str(error) or repr(error)
        self._serve_if_only(change)
        engine.enter(EngineState.READY)
        return SwapOutcome.SUCCEEDED, None

    async def _restart(self, change: SwapInProgress, engine: Replica) -> Result:
        change.report(f"starting the engine again, with {change.target}")
        try:
            found = await change.cancellation.interrupting(engine.start(change.target))
        except SupersededError as error:
            change.report(str(error))
            if self._pool.ready:  # others serve the version before; this one is started beside what comes now
                engine.enter(EngineState.STOPPED)
                return SwapOutcome.CANCELLED, str(error)
            started = await self._start_before(change, engine)
            return SwapOutcome.CANCELLED if started else SwapOutcome.FAILED, str(error)
        except Exception as error:  # whatever it was, the engine was ended
            log.warning("the engine did not start with %s", change.target, exc_info=error)
            change.report(f"failed: {_line(error)}")
            return await self._replace_engine(change, engine), str(error) or repr(error)
        self._serve_if_only(change)
        change.restart = not change.reloads  # where it had no probes: now it has, and the others can be reloaded
        change.report(found)
        return SwapOutcome.SUCCEEDED, None

    async def _load(
        self, engine: Replica, target: Target, report: Report, check: Callable[[], None] = lambda: None
    ) -> None:
        """Loads and verifies; a reload is never cut off, because nobody would know what the engine holds.

        Args:
            check: raises where it is to stop.
        """
        started = time.monotonic()
        await engine.reload(await self._verification.folder(target))
        report(f"weights of {target} loaded in {time.monotonic() - started:.2f} s, prefix cache reset")
        check()
        report(await engine.verify(target))
        check()

    async def _restore(self, change: SwapInProgress, engine: Replica, error: Exception) -> SwapOutcome:
        """The version before: in the same engine where that still answered, else in a new one.

        Anything but a failed probe, above all a reload that failed, is taken for the engine's death.
        """
        if not isinstance(error, ProbeError | SupersededError):
            return await self._replace_engine(change, engine)
        try:
            await self._verification.files(change.current)
            await self._load(engine, change.current, change.report)
        except Exception as second:  # as above
            log.warning("the engine cannot go back to %s", change.current, exc_info=second)
            return await self._replace_engine(change, engine)
        engine.enter(EngineState.READY)
        return SwapOutcome.RESTORED

    async def replace_serving(self, change: SwapInProgress, engine: Replica) -> SwapOutcome:
        """A new engine with the version before for one that serves; it answers first what runs in it, if it can."""
        async with self._without(change, engine):
            await self._end_requests(engine)
            if engine.running:
                change.report(f"{engine.running} requests are cut off")
            return SwapOutcome.RESTORED if await self._start_before(change, engine) else SwapOutcome.FAILED

    async def _end_requests(self, engine: Replica) -> None:
        """Return when nothing runs, or after RETIRE_TIMEOUT_S; after `drain_timeout_s` where requests are queued."""
        deadline, queueing = time.monotonic() + RETIRE_TIMEOUT_S, False
        while engine.running and time.monotonic() < deadline:
            if not queueing and not self._pool.ready:
                queueing, deadline = True, min(deadline, time.monotonic() + self._drain_timeout_s)
            with suppress(TimeoutError):
                await engine.drained(_DRAIN_POLL_S)

    async def _replace_engine(self, change: SwapInProgress, engine: Replica) -> SwapOutcome:
        """A new engine with the version before for one that is dead or cannot be trusted."""
        change.report("the engine cannot go on: replacing it")
        self._pool.count_restart()
        await self._start_before(change, engine)
        return SwapOutcome.FAILED

    async def _start_before(self, change: SwapInProgress, engine: Replica) -> bool:
        """Whether it starts; if not, the reconciler goes on trying."""
        try:
            await engine.start(change.current)
        except Exception as error:  # whatever it was, it may be gone later
            log.exception("the new engine did not start")
            change.report(f"the new engine did not start: {_line(error)}")
            return False
        change.report(f"a new engine runs {change.current}")
        return True


def _resume(engine: Replica) -> None:
    """Have an engine take requests again, unless the version that it holds is unknown, as of one that is asleep."""
    engine.enter(EngineState.READY if engine.target is not None else EngineState.FAILED)


def _line(error: Exception) -> str:
    """An error as a step: what was wrong, without what to do."""
    return error.wrong if isinstance(error, SvcError) else repr(error)
