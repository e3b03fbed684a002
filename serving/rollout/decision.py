"""Decides from the evidence when a step of a rollout ends, and when the rollout ends with it."""

from collections.abc import Callable

from serving.rollout.evidence import Assessment
from serving.rollout.store_retry import retrying
from serving.rollout.stored_rollout import StoppedError, StoredRollout
from svc.errors import EngineError
from svc.settings.rollout import AtDeadline
from svc.store.rollouts import RolloutOutcome

_LOOK_S = 1.0
"""Seconds between two checks of whether the candidate is worse. The decision stays valid no matter how many checks
are made."""


class Decision:
    """The leader's decisions in a rollout.

    Args:
        report: function called with a description of each event.
    """

    def __init__(self, stored: StoredRollout, report: Callable[[str], None]) -> None:
        self._stored = stored
        self._report = report
        self._warned = set(stored.record.steps)

    async def reached(self, assessment: Callable[[], Assessment], check: Callable[[], None]) -> Assessment:
        """Check the evidence regularly until it completes the current step, and return it.

        Args:
            assessment: function that returns the evidence.
            check: function that raises an error if the step cannot continue.

        Raises:
            LeaseLostError: another server leads the rollout now.
            StoppedError: the candidate is proven to be worse, its engine died, or the deadline passed without a
                decision.
            SupersededError: a user stopped the rollout.
        """
        stored, plan, held = self._stored, self._stored.record.plan, False
        while True:
            stored.require_lead()
            seen = await retrying(assessment)
            await stored.enter_signals(seen.signals)
            if seen.warning and seen.warning not in self._warned:
                self._warned.add(seen.warning)
                self._report(seen.warning)
            if seen.losses:
                raise StoppedError(RolloutOutcome.ROLLED_BACK, seen.losses)
            if seen.is_complete:
                return seen
            try:
                check()
            except EngineError as error:
                raise StoppedError(RolloutOutcome.FAILED, str(error)) from error
            if stored.step_s >= plan.max_step_s and not held:
                why = f"no decision after {plan.max_step_s:g} s: {seen.text}"
                if plan.at_deadline is AtDeadline.ROLLBACK:
                    raise StoppedError(RolloutOutcome.UNDECIDED, why)
                held = True
                self._report(
                    f"{why}; staying at this step until the result is conclusive; to stop the rollout: svc rollback"
                )
            await stored.cancellation.pause(_LOOK_S)
