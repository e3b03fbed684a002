"""Changes the version of all engines without losing any request or mixing two versions in one answer.

`EngineChange` changes one engine after another, while the other engines keep answering requests. If the
swap fails or is superseded, the previous version is restored and verified again on every engine. An engine that cannot
be restored accepts no requests. Each engine is locked while its version is being changed. An engine that dies before
or after its turn is restarted with the previous version, independently of the swap, and then changed.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, replace

from sqlalchemy.exc import SQLAlchemyError

from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.rollout.cancellation import Cancellation, SupersededError
from serving.rollout.engine_change import EngineChange, Result, SwapInProgress
from serving.rollout.swap_plan import Report
from svc.engine.client import DOWN
from svc.engine.state import EngineState
from svc.errors import SvcError
from svc.store.swaps import SwapOutcome, SwapResult
from svc.version import Target

log = logging.getLogger(__name__)

_HEALTH_POLL_S = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Swap:
    """Changes the version that all engines in a pool run.

    Attributes:
        engine_change: object that changes a single engine's version.
    """

    engine_change: EngineChange

    @property
    def pool(self) -> EnginePool:
        return self.engine_change.pool

    async def run(
        self, current: Target, target: Target, report: Report, cancellation: Cancellation | None = None
    ) -> SwapResult:
        """Swap to `target`, or keep `current` in production if that fails.

        A problem with a version is reported in the result rather than raised.

        Args:
            current: version that the engines run.
            report: function called with a description of each step.
            cancellation: if it is requested, the swap stops and `current` is restored.
        """
        began, cancellation = time.monotonic(), cancellation or Cancellation()
        try:
            plan = await cancellation.interrupting(self.engine_change.planner.plan(current, target, report))
        except SupersededError as error:
            return SwapResult(SwapOutcome.CANCELLED, str(error))
        except (SvcError, OSError, SQLAlchemyError) as error:
            log.warning("the swap to %s was refused", target, exc_info=error)
            return SwapResult(SwapOutcome.REFUSED, str(error))
        running = self.pool.admission.running
        change = SwapInProgress(current, target, plan, report, cancellation)
        outcome, reason = await self._change_all_or_none(change)
        took_s = time.monotonic() - began
        if change.queued_s is not None:
            report(f"requests were queued for {change.queued_s:.2f} s, up to {change.queued} at a time")
        return SwapResult(outcome, reason, change.queued_s, running, change.queued, change.plan.kind, took_s)

    async def _change_all_or_none(self, change: SwapInProgress) -> Result:
        """Change all engines. If one of them cannot be changed, restore the previous version on all of them."""
        try:
            outcome, reason = await self._change_all(change)
        except SupersededError as error:
            change.report(str(error))
            outcome, reason = SwapOutcome.CANCELLED, str(error)
        except Exception as error:  # a defect; it is handled like any other failure
            log.exception("unexpected error in the swap to %s", change.target)
            change.report(f"failed: {error!r}")
            outcome, reason = SwapOutcome.FAILED, repr(error)
        if outcome is not SwapOutcome.SUCCEEDED:
            return max(outcome, await self._back(change), key=_severity), reason
        self.pool.names.serve(change.target)
        return outcome, None

    async def _change_all(self, change: SwapInProgress) -> Result:
        changed = 0
        while (engine := self._next(change)) is not None:
            change.cancellation.check()
            if engine.lock.locked():
                change.report(f"replica {engine.replica} died and is being restarted; waiting for it")
            async with change.cancellation.holding(self.pool, engine):
                if self._is_changed(change, engine) or (
                    changed and not await change.cancellation.interrupting(_recovers(engine))
                ):
                    continue  # a dead engine is chosen again, or is started with the version that serves in the end
                outcome, reason = await self.engine_change.run(change, engine)
            if outcome is not SwapOutcome.SUCCEEDED:
                return outcome, reason
            changed += 1
            if len(self.pool.members) > 1:
                holding = sum(member.target == change.target for member in self.pool.ready)
                change.report(f"{holding} of {len(self.pool.members)} engines now run {change.target}")
        if not changed:
            return SwapOutcome.FAILED, "the engine died before it was changed"
        return SwapOutcome.SUCCEEDED, None

    def _next(self, change: SwapInProgress) -> Replica | None:
        """Return the next member to change, or None if all members are done.

        The returned member may still be starting with the previous version.
        """
        return next((member for member in self.pool.members if not self._is_changed(change, member)), None)

    def _is_changed(self, change: SwapInProgress, engine: Replica) -> bool:
        """Return whether the swap can skip an engine, because it already runs the new version or is dead. A dead engine
        is restarted independently of the swap.
        """
        return engine.target == change.target or engine in self.pool.down

    async def _back(self, change: SwapInProgress) -> SwapOutcome:
        """Restore the previous version on the engines that were already changed, using the same kind of swap.

        Returns:
            The worst outcome, or SUCCEEDED if no engine had been changed.
        """
        worst = SwapOutcome.SUCCEEDED
        # Restoring the previous version cannot be cancelled.
        plan = replace(change.plan, restart=not change.plan.reloads)
        back = replace(change, target=change.current, plan=plan, cancellation=Cancellation())
        for engine in [member for member in self.pool.ready if member.target == change.target]:
            if worst is SwapOutcome.SUCCEEDED:
                change.report(f"restoring {change.current} on the engines that were changed")
                worst = SwapOutcome.RESTORED
            async with back.cancellation.holding(self.pool, engine):
                if engine.state is not EngineState.READY or engine.target != change.target:
                    continue  # it died meanwhile, and is restarted with the previous version
                outcome, _ = await self.engine_change.run(back, engine)
                if outcome is SwapOutcome.REFUSED:
                    outcome = await self.engine_change.replace_serving(back, engine)
            worst = max(worst, outcome, key=_severity) if outcome is SwapOutcome.FAILED else worst
        change.queued_s, change.queued = back.queued_s, back.queued
        return worst


async def _recovers(engine: Replica) -> bool:
    """Wait until an engine passes its health check or is no longer ready, and return whether it passed.

    Each check without a response is reported to `engine.watch`, which determines whether the engine is dead.
    """
    while engine.state is EngineState.READY:
        if await engine.client.health() not in DOWN:
            return True
        engine.watch.suspect()
        await asyncio.sleep(_HEALTH_POLL_S)
    return False


def _severity(outcome: SwapOutcome) -> int:
    return list(SwapOutcome).index(outcome)
