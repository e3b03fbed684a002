"""Changes an engine's version in place or by replacing the engine, and restores the old version on failure.

In place: stop sending requests -> drain -> reload -> reset the prefix cache -> check the probes. If no
other engine accepts requests, requests are queued during the change. Blue-green: start a second engine with
the version, check the probes, replace the first engine, then drain it. No request has to wait, but both
engines must fit into memory. Probes are recorded only on an engine that was started with the version. Until
probes exist for this kind of engine, the version is loaded by starting an engine with it: a second engine or, if memory
is short, the same engine after a restart. An adapter of the same base is loaded and checked while requests run.

A superseded change stops as soon as it safely can: while waiting, while an engine starts, or after a reload. A reload
is never cancelled, because that would leave the engine's weights in an unknown state.
"""

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.engines.retirement import RETIRE_TIMEOUT_S
from serving.engines.verification import Verification
from serving.rollout.cancellation import Cancellation, SupersededError
from serving.rollout.second_engine import start_second_engine
from serving.rollout.swap_plan import Plan, Report, SwapPlanner
from svc.engine.client import DOWN
from svc.engine.state import EngineState
from svc.errors import EngineError, ProbeError, SvcError
from svc.store.swaps import SwapKind, SwapOutcome
from svc.version import Target

log = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.1

Result = tuple[SwapOutcome, str | None]
"""Outcome of a change, and the reason if it did not succeed."""


class RequestsRunError(EngineError):
    """Raised when requests are still running after the drain timeout. The engine then keeps serving its current
    version.
    """


@dataclass(slots=True)
class SwapInProgress:
    """A swap in progress.

    Attributes:
        current: version that the engines ran when the swap began.
        plan: how to swap. It is replaced if it cannot be carried out.
        queued_s: total time for which admission was closed, in seconds, or None if it was not closed.
        queued: largest number of requests queued at the same time.
    """

    current: Target
    target: Target
    plan: Plan
    report: Report
    cancellation: Cancellation
    queued_s: float | None = None
    queued: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineChange:
    """Changes the version that a pool's engines run, one engine at a time.

    Attributes:
        drain_timeout_s: longest time to wait for an engine's running requests before an in-place change, in
            seconds.
    """

    planner: SwapPlanner
    verification: Verification
    pool: EnginePool
    drain_timeout_s: float

    async def run(self, change: SwapInProgress, engine: Replica) -> Result:
        """Change one engine's version, in place or by replacing the engine."""
        candidate = self.pool.candidate
        if candidate is not None and candidate.state is EngineState.READY and candidate.target == change.target:
            if len(self.pool.members) == 1:
                change.plan = replace(change.plan, kind=SwapKind.BLUEGREEN)
            self.pool.set_candidate(None)
            return self._replace(change, engine, candidate)
        if change.plan.kind not in (SwapKind.BLUEGREEN, SwapKind.ADAPTER):
            try:
                return await self._in_place(change, engine)
            except EngineError as error:
                change.report(f"the change cannot be made in place: {error.wrong}")
                change.plan = replace(change.plan, why=error.wrong)
            except OSError as error:  # the record of the version that the engine serves could not be cleared first
                log.warning("could not load %s", change.target, exc_info=error)
                return SwapOutcome.REFUSED, _failure(change, error)
        try:
            is_adapter = change.plan.kind is SwapKind.ADAPTER
            return await (self._by_adapter if is_adapter else self._blue_green)(change, engine)
        except SupersededError:
            raise
        except Exception as error:  # any error: the serving engine was not touched
            log.warning("could not load, start or verify %s", change.target, exc_info=error)
            return SwapOutcome.REFUSED, _failure(change, error)

    async def _by_adapter(self, change: SwapInProgress, engine: Replica) -> Result:
        """Load and verify an adapter while requests run. New requests use it once it is verified."""
        result = await change.cancellation.interrupting(engine.switch_adapter(change.target))
        change.report(f"adapter loaded: {result}")
        self._serve_if_only(change)
        return SwapOutcome.SUCCEEDED, None

    async def _blue_green(self, change: SwapInProgress, old: Replica) -> Result:
        shortage = await change.cancellation.interrupting(self.planner.shortage(change.target))
        if shortage:
            change.report(f"not enough memory for a second engine: {shortage}")
            return SwapOutcome.REFUSED, f"not enough memory for a second engine: {shortage} ({change.plan.why})"
        change.plan = replace(change.plan, kind=SwapKind.BLUEGREEN)
        change.report(f"starting a second engine with {change.target}")
        new, result = await start_second_engine(self.pool, change.target, change.cancellation)
        change.report(result)
        return self._replace(change, old, new)

    def _replace(self, change: SwapInProgress, old: Replica, new: Replica) -> Result:
        """Replace an engine with another one that already runs the version."""
        self._serve_if_only(change)
        self.pool.replace(old, new)
        change.report(
            f"new requests are sent to the second engine; requests still running in the first engine: {old.running}"
        )
        return SwapOutcome.SUCCEEDED, None

    def _serve_if_only(self, change: SwapInProgress) -> None:
        """Switch production to the target, unless other engines still run the previous version."""
        if len(self.pool.alive) <= 1:
            self.pool.names.serve(change.target)

    async def _in_place(self, change: SwapInProgress, engine: Replica) -> Result:
        if not change.plan.restart:
            await change.cancellation.interrupting(engine.fetch(change.target))
        async with self._without(change, engine):
            if replaced := await self._emptied(change, engine):
                return replaced
            return await (self._restart if change.plan.restart else self._reload)(change, engine)

    @asynccontextmanager
    async def borrowed(self, change: SwapInProgress, engine: Replica) -> AsyncIterator[None]:
        """Load `change.target` into the only engine for the duration of the `with` body, while clients' requests are
        queued.

        Afterwards, `change.current` is loaded and verified, or a new engine is started with it, before requests are
        answered again. `change.target` never answers a client's request, and no later server adopts the engine while
        `change.target` is loaded. The caller must hold the engine, and must have verified the files of `change.target`.

        Raises:
            SupersededError: cancellation was requested.
            EngineError: `change.target` could not be loaded, or failed its probes, or the engine had to be replaced.
        """
        async with self._without(change, engine):
            if replaced := await self._emptied(change, engine):
                raise EngineError(f"the engine died: {replaced[1]}", todo="check the engine's log")
            try:
                await self._load(engine, change.target, change.report, change.cancellation.check)
                await engine.clear()
                yield
            except Exception as error:  # any error: the previous version must be restored
                await self._give_back(change, engine, error)
                raise
            await self._give_back(change, engine, SupersededError("the candidate no longer needs the engine"))

    async def _give_back(self, change: SwapInProgress, engine: Replica, error: Exception) -> None:
        """Restore the previous version in a borrowed engine, or in a new engine if the borrowed one fails.

        Raises:
            EngineError: the engine was healthy before it was borrowed, but had to be replaced.
        """
        weights = engine.weights
        with suppress(EngineError):  # then the load fails too, and the engine is replaced
            await self._drain(engine)
        with suppress(OSError):  # until production is loaded, no later server may adopt the engine
            await engine.clear()
        if isinstance(error, EngineError) and not isinstance(error, ProbeError):
            await self._replace_engine(change, engine)
        elif await self._load_again(change, engine) is SwapOutcome.RESTORED:
            engine.weights = weights  # the same as before, by their probes: no new held-out evaluation is due
        elif isinstance(error, SupersededError):
            raise EngineError(f"the engine could not reload {change.current}", todo="check the engine's log")

    async def _emptied(self, change: SwapInProgress, engine: Replica) -> Result | None:
        """Drain the engine, and mark its version as unknown.

        Returns:
            None, or the result of the change if the engine died and was replaced.

        Raises:
            SupersededError: cancellation was requested. The engine keeps serving.
            EngineError, OSError: requests are still running, or the engine cannot be changed. The engine keeps serving.
        """
        try:
            await change.cancellation.interrupting(self._drain(engine))
            change.cancellation.check()
            await engine.clear()
        except EngineError as error:
            # If requests still run, detecting a hanging engine is left to the pool, which is more patient.
            if not isinstance(error, RequestsRunError) and await engine.client.health() in DOWN:
                return await self._replace_engine(change, engine), str(error)
            _resume(engine)
            raise
        except BaseException:
            _resume(engine)
            raise
        change.report("running requests completed")
        engine.enter(EngineState.SWAPPING)
        return None

    @asynccontextmanager
    async def _without(self, change: SwapInProgress, engine: Replica) -> AsyncIterator[None]:
        """Stop sending requests to the engine for the duration of the `with` body.

        Requests go to the other engines or, if there are none, wait in the queue.
        """
        try:
            async with self.pool.admission.changing():
                engine.enter(EngineState.DRAINING)
                try:
                    if not self.pool.ready:
                        change.report(f"queueing new requests; requests still running: {self.pool.admission.running}")
                    yield
                except BaseException:
                    # Cancelled, or a defect. The engine's weights are unknown, so it must not receive requests.
                    if engine.state is not EngineState.READY:
                        engine.enter(EngineState.FAILED)
                    raise
        finally:
            if self.pool.admission.closed_s is not None:
                change.queued_s = (change.queued_s or 0.0) + self.pool.admission.closed_s
                change.queued = max(change.queued or 0, self.pool.admission.queue.most)

    async def _drain(self, engine: Replica) -> None:
        """Wait until the engine has no running requests, then reset its prefix cache.

        Requests whose clients have disconnected count as running.

        Raises:
            RequestsRunError: requests were still running after the timeout.
            EngineError: the engine died or is still busy.
        """
        try:
            await engine.drained(self.drain_timeout_s)
        except TimeoutError:
            after = f"after {self.drain_timeout_s:g} s (`serve.drain_timeout_s`)"
            raise RequestsRunError(f"{engine.running} requests were still running {after}") from None
        await engine.watch.while_alive(engine.client.reset_prefix_cache())

    async def _reload(self, change: SwapInProgress, engine: Replica) -> Result:
        try:
            await self._load(engine, change.target, change.report, change.cancellation.check)
        except SupersededError as error:
            change.report(str(error))
            outcome = await self._restore(change, engine, error)
            return SwapOutcome.CANCELLED if outcome is SwapOutcome.RESTORED else outcome, str(error)
        except Exception as error:  # any error: weights that are not verified must not serve
            log.warning("could not load or verify %s", change.target, exc_info=error)
            why = _failure(change, error)
            return await self._restore(change, engine, error), why
        self._serve_if_only(change)
        engine.enter(EngineState.READY)
        return SwapOutcome.SUCCEEDED, None

    async def _restart(self, change: SwapInProgress, engine: Replica) -> Result:
        change.report(f"restarting the engine with {change.target}")
        try:
            result = await change.cancellation.interrupting(engine.start(change.target))
        except SupersededError as error:
            change.report(str(error))
            if self.pool.ready:  # others serve the previous version; the reviver starts this one
                engine.enter(EngineState.STOPPED)
                return SwapOutcome.CANCELLED, str(error)
            started = await self._start_before(change, engine)
            return SwapOutcome.CANCELLED if started else SwapOutcome.FAILED, str(error)
        except Exception as error:  # any error: the engine was stopped
            log.warning("could not start the engine to serve %s", change.target, exc_info=error)
            why = _failure(change, error)
            return await self._replace_engine(change, engine), why
        self._serve_if_only(change)
        # If probes were missing, there are some now, and the other engines can be reloaded.
        change.plan = replace(change.plan, restart=not change.plan.reloads)
        change.report(result)
        return SwapOutcome.SUCCEEDED, None

    async def _load(
        self, engine: Replica, target: Target, report: Report, check: Callable[[], None] = lambda: None
    ) -> None:
        """Load and verify a version. A reload is never cancelled, since that would leave the engine's weights in an
        unknown state.

        Args:
            check: function that raises an error if the version change has been cancelled.
        """
        started = time.monotonic()
        await engine.reload(await self.verification.folder(target))
        report(f"weights of {target} loaded in {time.monotonic() - started:.2f} s, prefix cache reset")
        check()
        report(await engine.verify(target))
        check()

    async def _restore(self, change: SwapInProgress, engine: Replica, error: Exception) -> SwapOutcome:
        """Restore the previous version, in the same engine if it still responds, or else in a new one.

        The engine counts as dead after any error except a failed probe, in particular after a failed reload.
        """
        if not isinstance(error, ProbeError | SupersededError):
            return await self._replace_engine(change, engine)
        return await self._load_again(change, engine, checks_files=True)

    async def _load_again(self, change: SwapInProgress, engine: Replica, *, checks_files: bool = False) -> SwapOutcome:
        """Load and verify the previous version, or replace the engine if that fails.

        Args:
            checks_files: whether to compare the files with the manifest first, which takes minutes for a large model.
        """
        try:
            if checks_files:
                await self.verification.files(change.current)
            await self._load(engine, change.current, change.report)
        except Exception as second:  # as above
            log.warning("could not restore %s in the engine", change.current, exc_info=second)
            return await self._replace_engine(change, engine)
        engine.enter(EngineState.READY)
        return SwapOutcome.RESTORED

    async def replace_serving(self, change: SwapInProgress, engine: Replica) -> SwapOutcome:
        """Drain a serving engine if possible, then replace it with a new engine that runs the previous version."""
        async with self._without(change, engine):
            await self._end_requests(engine)
            if engine.running:
                change.report(f"{engine.running} requests are being cancelled")
            return SwapOutcome.RESTORED if await self._start_before(change, engine) else SwapOutcome.FAILED

    async def _end_requests(self, engine: Replica) -> None:
        """Wait until the engine has no running requests, or until a time limit is reached.

        The limit is `RETIRE_TIMEOUT_S`, or `drain_timeout_s` while requests are queued.
        """
        deadline, queueing = time.monotonic() + RETIRE_TIMEOUT_S, False
        while engine.running and time.monotonic() < deadline:
            if not queueing and not self.pool.ready:
                queueing, deadline = True, min(deadline, time.monotonic() + self.drain_timeout_s)
            with suppress(TimeoutError):
                await engine.drained(_DRAIN_POLL_S)

    async def _replace_engine(self, change: SwapInProgress, engine: Replica) -> SwapOutcome:
        """Replace a dead or untrusted engine with a new engine that runs the previous version."""
        change.report("the engine cannot continue; replacing it")
        self.pool.count_restart()
        await self._start_before(change, engine)
        return SwapOutcome.FAILED

    async def _start_before(self, change: SwapInProgress, engine: Replica) -> bool:
        """Start the engine with the previous version, and return whether it started.

        If it did not start, a background task (`Reviver`) tries again later.
        """
        try:
            await engine.start(change.current)
        except Exception as error:  # any error: it may be temporary
            log.exception("could not start the new engine")
            change.report(f"the new engine did not start: {_line(error)}")
            return False
        change.report(f"a new engine runs {change.current}")
        return True


def _resume(engine: Replica) -> None:
    """Make an engine accept requests again, or mark it as failed if its version is unknown."""
    engine.enter(EngineState.READY if engine.target is not None else EngineState.FAILED)


def _failure(change: SwapInProgress, error: Exception) -> str:
    """Report that a change failed, and return the reason."""
    change.report(f"failed: {_line(error)}")
    return str(error) or repr(error)


def _line(error: Exception) -> str:
    """Return an error's text for the journal: what went wrong, without the advice on what to do."""
    return error.wrong if isinstance(error, SvcError) else repr(error)
