"""What a trial has found, and which of several is taken: no difference is believed that may be chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict

from svc.evaluation.estimate import Estimate, paired_difference
from svc.evaluation.training_curve import TrainingPoint


class Pruned(Exception):
    """A trial was given up: others were better at this step."""


class Status(StrEnum):
    """How a trial ended."""

    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"
    """Its loss exploded, or memory was short."""


class Outcome(BaseModel):
    """A trial that has ended.

    Attributes:
        key: of what was trained (trainer.sweep.values).
        values: what it changes in the recipe.
        loss: held-out, nats an answer token; of one that was not completed None.
        heldout_each: of each judged example, in one order in all trials.
        points: every step of the training.
        seconds: of the process that ended it.
        why: of one that was not completed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    values: dict[str, Any]
    status: Status
    loss: Estimate | None = None
    heldout_each: tuple[float, ...] = ()
    points: tuple[TrainingPoint, ...] = ()
    steps: int = 0
    seconds: float = 0.0
    why: str | None = None

    @property
    def mean(self) -> float:
        """Held-out loss; infinite where it was not measured to the end."""
        return self.loss.value if self.loss else float("inf")

    @property
    def overfits(self) -> bool:
        """Whether held-out loss rose past an earlier measurement, beyond chance, while training loss fell."""
        measured = [point for point in self.points if point.heldout_each]
        if len(measured) < 2:
            return False
        best, last = min(measured, key=lambda point: point.heldout_loss or 0.0), measured[-1]
        if best.step == last.step:
            return False
        losses = [(point.step, point.loss) for point in self.points if point.loss is not None]
        before = [loss for step, loss in losses if step <= best.step]
        after = [loss for step, loss in losses if step > best.step]
        rise = paired_difference(best.heldout_each, last.heldout_each)
        return rise.low > 0 and bool(before and after) and fmean(after) < fmean(before)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Compares trials on the same held-out examples.

    Attributes:
        tokens: answer tokens of each; held-out loss is a mean over tokens.
    """

    tokens: tuple[int, ...]

    def difference(self, first: Outcome, second: Outcome) -> Estimate:
        """Held-out loss of the second minus that of the first, example by example."""
        return paired_difference(first.heldout_each, second.heldout_each, self.tokens)

    def distinct(self, first: Outcome, second: Outcome) -> bool:
        """Whether they differ beyond chance."""
        found = self.difference(first, second)
        return found.low > 0 or found.high < 0

    def choose(self, outcomes: Sequence[Outcome]) -> Outcome:
        """The first of those that cannot be told apart from the best.

        Args:
            outcomes: in the order in which they are preferred; at least one is complete.
        """
        complete = [one for one in outcomes if one.status is Status.COMPLETE]
        best = min(complete, key=lambda one: one.mean)
        return next(one for one in complete if one is best or not self.distinct(one, best))
