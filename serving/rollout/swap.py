"""Brings another version into the engines, with no request lost and none answered by two versions.

One engine after the other, each in one of two ways. In place: no new requests for it -> let the running ones end ->
reload -> reset the prefix cache -> check the probes. Where no other engine takes requests, they wait meanwhile.
Blue-green: start a second engine with the version, check the probes, put it in the place of the first, let
that answer its last requests. Nobody waits, but there must be memory for both. A version that this kind of engine has
never loaded needs an engine that starts with it: a second one, or, without memory for it, the same one again.

Whatever fails ends with the version before on every engine, verified again; where admission opens for any other
reason, there is no engine behind it.
"""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from sqlalchemy.exc import SQLAlchemyError

from serving.admission import Admission
from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.engines.verification import Verification
from serving.model_names import ModelNames
from serving.rollout.swap_plan import Report, SwapPlanner
from svc.engine.state import EngineState
from svc.engine.vllm.client import DOWN
from svc.errors import EngineError, ProbeError, SvcError
from svc.store.swaps import SwapKind, SwapOutcome, SwapResult
from svc.version import Target

log = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.1


class RequestsRunError(EngineError):
    """Requests still run after the drain timeout; the engine serves on."""


@dataclass(slots=True)
class _Change:
    """One swap while it is under way.

    Attributes:
        kind, why, restart: see `Plan`; they change where what was planned cannot be done.
        queued_s: how long admission was closed, all in all; None while it never was.
        running: requests in the engines when it began.
        queued: most requests that waited.
    """

    current: Target
    target: Target
    kind: SwapKind
    why: str
    restart: bool
    report: Report
    running: int
    queued_s: float | None = None
    queued: int | None = None


class Swap:
    """Changes the version in the engines of a pool.

    Args:
        drain_timeout_s: longest wait for the requests that run in an engine, in place.
        retire_timeout_s: the same for an engine that must be replaced while others take the requests.
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
        retire_timeout_s: float,
    ) -> None:
        self._planner = planner
        self._verification = verification
        self._pool = pool
        self._admission = admission
        self._names = names
        self._drain_timeout_s = drain_timeout_s
        self._retire_timeout_s = retire_timeout_s

    async def run(self, current: Target, target: Target, report: Report) -> SwapResult:
        """Swaps, or leaves `current` serving. Raises for nothing that has to do with the two versions.

        Args:
            current: what the engines hold.
            report: hears each step.
        """
        began = time.monotonic()
        try:
            plan = await self._planner.plan(current, target, report)
        except (SvcError, OSError, SQLAlchemyError) as error:
            log.warning("%s refused", target, exc_info=error)
            return SwapResult(SwapOutcome.REFUSED, str(error))
        change = _Change(current, target, plan.kind, plan.why, plan.restart, report, self._admission.running)
        outcome, reason = await self._change_all(change)
        took_s = time.monotonic() - began
        if change.queued_s is not None:
            report(f"queued requests for {change.queued_s:.2f} s, {change.queued} of them")
        return SwapResult(outcome, reason, change.queued_s, change.running, change.queued, change.kind, took_s)

    async def _change_all(self, change: _Change) -> tuple[SwapOutcome, str | None]:
        changed: list[Replica] = []
        for engine in self._pool.alive:
            if changed and not await _lives(engine):
                continue  # it died meanwhile: it is started again with what serves then
            outcome, reason, engine = await self._change_one(change, engine)
            if outcome is not SwapOutcome.SUCCEEDED:
                if changed:
                    change.report(f"back to {change.current} on the engines that were changed")
                    outcome = max(outcome, await self._back(change, changed), key=_severity)
                return outcome, reason
            changed.append(engine)
            if len(self._pool.members) > 1:
                change.report(f"{len(changed)} of {len(self._pool.members)} engines hold {change.target}")
        if not changed:
            return SwapOutcome.FAILED, "the engine died before it was changed"
        self._names.serve(change.target)
        return SwapOutcome.SUCCEEDED, None

    async def _back(self, change: _Change, changed: list[Replica]) -> SwapOutcome:
        """Brings the version before back to engines that were changed already, in the way in which they were."""
        worst = SwapOutcome.RESTORED
        # Whatever fails, the version before is what comes.
        back = replace(change, target=change.current, restart=False)
        for engine in changed:
            if engine.state is not EngineState.READY:
                continue  # it died meanwhile: it is started again with the version before
            outcome, _, engine = await self._change_one(back, engine)
            if outcome is SwapOutcome.REFUSED:
                outcome = await self._replace_serving(back, engine)
            if outcome is SwapOutcome.FAILED:
                worst = outcome
        change.queued_s, change.queued = back.queued_s, back.queued
        return worst

    async def _change_one(self, change: _Change, engine: Replica) -> tuple[SwapOutcome, str | None, Replica]:
        """One engine, in place or by another that takes its place; and the one that has the place then."""
        if change.kind is SwapKind.BLUEGREEN:
            return await self._blue_green(change, engine)
        try:
            return *await self._in_place(change, engine), engine
        except EngineError as error:
            change.report(f"not in place: {error.wrong}")
            change.why = error.wrong
            return await self._blue_green(change, engine)
        except OSError as error:
            log.warning("%s cannot be noted for an engine", change.target, exc_info=True)
            return SwapOutcome.REFUSED, str(error), engine

    async def _blue_green(self, change: _Change, old: Replica) -> tuple[SwapOutcome, str | None, Replica]:
        try:
            shortage = await self._planner.shortage(change.target)
        except (SvcError, OSError) as error:
            log.warning("no second engine with %s", change.target, exc_info=True)
            return SwapOutcome.REFUSED, str(error), old
        if shortage:
            change.report(f"no room for a second engine: {shortage}")
            return SwapOutcome.REFUSED, f"no room for a second engine: {shortage} ({change.why})", old
        change.kind = SwapKind.BLUEGREEN
        change.report(f"starting a second engine with {change.target}")
        new = self._pool.add()
        try:
            found = await new.start(change.target)
        except Exception as error:  # whatever it was, the engine that serves was not touched
            log.warning("no second engine with %s", change.target, exc_info=error)
            change.report(f"failed: {_line(error)}")
            await self._pool.drop(new)
            return SwapOutcome.REFUSED, str(error) or repr(error), old
        change.report(found)
        self._serve_if_only(change)
        self._pool.replace(old, new)
        change.report(f"requests go to it; {old.running} still run in the one before")
        return SwapOutcome.SUCCEEDED, None, new

    def _serve_if_only(self, change: _Change) -> None:
        """Where others still hold the version before, that one is in production until all are changed."""
        if len(self._pool.alive) <= 1:
            self._names.serve(change.target)

    async def _in_place(self, change: _Change, engine: Replica) -> tuple[SwapOutcome, str | None]:
        async with self._without(change, engine):
            try:
                await self._drain(engine)
            except EngineError as error:
                # Where requests run still, an engine that hangs is found by the pool, which is more patient.
                if not isinstance(error, RequestsRunError) and await engine.client.health() in DOWN:
                    return await self._replace_engine(change, engine), str(error)
                engine.enter(EngineState.READY)
                raise
            except BaseException:
                engine.enter(EngineState.READY)
                raise
            change.report("running requests ended")
            engine.enter(EngineState.SWAPPING)
            try:
                return await (self._restart if change.restart else self._reload)(change, engine)
            except BaseException:
                # Cancelled, or a defect. Nobody knows which weights the engine holds, so nobody may reach it.
                engine.enter(EngineState.FAILED)
                raise

    @asynccontextmanager
    async def _without(self, change: _Change, engine: Replica) -> AsyncIterator[None]:
        """Without new requests for the engine: others take them, or they wait from when there is no other."""
        try:
            async with self._admission.changing():
                engine.enter(EngineState.DRAINING)
                if not self._pool.ready:
                    change.report(f"queueing new requests, {self._admission.running} running")
                yield
        finally:
            if self._admission.closed_s is not None:
                change.queued_s = (change.queued_s or 0.0) + self._admission.closed_s
                change.queued = max(change.queued or 0, self._admission.most_queued)

    async def _drain(self, engine: Replica) -> None:
        """Returns when no request runs: none that a client waits for, and none that one left behind in the engine.

        Raises:
            RequestsRunError: some still ran after the timeout.
            EngineError: the engine is gone, or still busy.
            OSError: a later server cannot be told that the engine holds the version before no more.
        """
        try:
            await engine.drained(self._drain_timeout_s)
        except TimeoutError:
            after = f"after {self._drain_timeout_s:g} s (serve.drain_timeout_s)"
            raise RequestsRunError(f"{engine.running} requests still ran {after}") from None
        await engine.unless_dead(engine.client.reset_prefix_cache())
        await engine.clear()

    async def _reload(self, change: _Change, engine: Replica) -> tuple[SwapOutcome, str | None]:
        try:
            await self._load(engine, change.target, change.report)
        except Exception as error:  # whatever it was, weights that are not verified must not serve
            log.warning("%s failed after its load", change.target, exc_info=error)
            change.report(f"failed: {_line(error)}")
            return await self._restore(change, engine, error), str(error) or repr(error)
        self._serve_if_only(change)
        engine.enter(EngineState.READY)
        return SwapOutcome.SUCCEEDED, None

    async def _restart(self, change: _Change, engine: Replica) -> tuple[SwapOutcome, str | None]:
        change.report(f"starting the engine again, with {change.target}")
        try:
            found = await engine.start(change.target)
        except Exception as error:  # whatever it was, the engine was ended
            log.warning("the engine did not start with %s", change.target, exc_info=error)
            change.report(f"failed: {_line(error)}")
            return await self._replace_engine(change, engine), str(error) or repr(error)
        self._serve_if_only(change)
        change.restart = False  # now it has probes, and the other engines can be reloaded
        change.report(found)
        return SwapOutcome.SUCCEEDED, None

    async def _load(self, engine: Replica, target: Target, report: Report) -> None:
        started = time.monotonic()
        await engine.reload(await self._verification.folder(target))
        report(f"weights of {target} loaded in {time.monotonic() - started:.2f} s, prefix cache reset")
        report(await engine.verify(target))

    async def _restore(self, change: _Change, engine: Replica, error: Exception) -> SwapOutcome:
        """The version before: in the same engine where that still answered, else in a new one.

        Anything but a failed probe, above all a reload that failed, is taken for the engine's death.
        """
        if not isinstance(error, ProbeError):
            return await self._replace_engine(change, engine)
        try:
            await self._verification.files(change.current)
            await self._load(engine, change.current, change.report)
        except Exception as second:  # as above
            log.warning("the engine cannot go back to %s", change.current, exc_info=second)
            return await self._replace_engine(change, engine)
        engine.enter(EngineState.READY)
        return SwapOutcome.RESTORED

    async def _replace_serving(self, change: _Change, engine: Replica) -> SwapOutcome:
        """A new engine with the version before for one that serves; it answers first what runs in it, if it can."""
        async with self._without(change, engine):
            await self._end_requests(engine)
            if engine.running:
                change.report(f"{engine.running} requests are cut off")
            return SwapOutcome.RESTORED if await self._start_before(change, engine) else SwapOutcome.FAILED

    async def _end_requests(self, engine: Replica) -> None:
        """Returns when nothing runs, or after `retire_timeout_s`; after `drain_timeout_s` where requests are queued."""
        deadline, queueing = time.monotonic() + self._retire_timeout_s, False
        while engine.running and time.monotonic() < deadline:
            if not queueing and not self._pool.ready:
                queueing, deadline = True, min(deadline, time.monotonic() + self._drain_timeout_s)
            with suppress(TimeoutError):
                await engine.drained(_DRAIN_POLL_S)

    async def _replace_engine(self, change: _Change, engine: Replica) -> SwapOutcome:
        """A new engine with the version before for one that is dead or cannot be trusted."""
        change.report("the engine cannot go on: replacing it")
        self._pool.count_restart()
        await self._start_before(change, engine)
        return SwapOutcome.FAILED

    async def _start_before(self, change: _Change, engine: Replica) -> bool:
        """Whether it starts; if not, the reconciler goes on trying."""
        try:
            await engine.start(change.current)
        except Exception as error:  # whatever it was, it may be gone later
            log.exception("the new engine did not start")
            change.report(f"the new engine did not start: {_line(error)}")
            return False
        change.report(f"a new engine runs {change.current}")
        return True


async def _lives(engine: Replica) -> bool:
    """Whether it takes requests; one whose death was not noticed yet is reported to its watch."""
    if engine.state is not EngineState.READY:
        return False
    if dead := await engine.client.health() in DOWN:
        engine.suspect()
    return not dead


def _severity(outcome: SwapOutcome) -> int:
    return list(SwapOutcome).index(outcome)


def _line(error: Exception) -> str:
    """An error as a step: what was wrong, without what to do."""
    return error.wrong if isinstance(error, SvcError) else repr(error)
