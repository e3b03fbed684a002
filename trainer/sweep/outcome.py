"""Results of trials, and how to choose among them. Differences that may be due to chance are ignored."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict

from svc.errors import TrainingError
from svc.evaluation.intervals import Interval, paired_difference
from trainer.training_curve import TrainingPoint


class Status(StrEnum):
    """Final state of a trial, named as in Optuna."""

    COMPLETE = "complete"
    PRUNED = "pruned"
    FAIL = "failed"
    """The trial failed because its loss exploded or memory ran out."""


class Summary(BaseModel):
    """The part of a trial's result that is shown in the table of a sweep.

    Attributes:
        values: recipe keys that the trial changes, with their values.
        loss: held-out loss in nats per answer token, or None if the trial was not completed.
        seconds: duration of training, not counting earlier attempts that were interrupted.
        why: the reason why the trial was not completed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    values: dict[str, Any]
    status: Status
    loss: Interval | None = None
    steps: int = 0
    seconds: float = 0.0
    why: str | None = None


class TrialOutcome(Summary):
    """Result of a trial.

    Attributes:
        key: key that identifies the trial's training (`trainer.sweep.values.training_key`).
        heldout_each: loss of each held-out example, in the same order in all trials.
        points: points of the training curve, one for each step.
        watched: held-out loss on a subset of the examples, measured during training and keyed by step.
    """

    key: str
    heldout_each: tuple[float, ...] = ()
    points: tuple[TrainingPoint, ...] = ()
    watched: dict[int, float] = {}

    @property
    def mean(self) -> float:
        """Mean held-out loss, or infinity if the trial was not completed."""
        return self.loss.value if self.loss else float("inf")

    @property
    def overfits(self) -> bool:
        """Whether held-out loss rose significantly from its minimum while training loss kept falling."""
        measured = [point for point in self.points if point.heldout_each]
        if not measured:
            return False
        best, last = min(measured, key=lambda point: point.heldout_loss or 0.0), measured[-1]
        before = [point.loss for point in self.points if point.loss is not None and point.step <= best.step]
        after = [point.loss for point in self.points if point.loss is not None and point.step > best.step]
        rise = paired_difference(best.heldout_each, last.heldout_each)
        return rise.low > 0 and bool(before and after) and fmean(after) < fmean(before)


@dataclass(frozen=True, slots=True)
class TrialComparison:
    """Compares trials on the same held-out examples.

    Attributes:
        tokens: number of answer tokens in each example. Held-out loss is a mean over tokens.
    """

    tokens: tuple[int, ...]

    def difference(self, first: TrialOutcome, second: TrialOutcome) -> Interval:
        """Return the second trial's held-out loss minus the first's, paired by example."""
        return paired_difference(first.heldout_each, second.heldout_each, self.tokens)

    def distinct(self, first: TrialOutcome, second: TrialOutcome) -> bool:
        """Return whether the losses of two trials differ significantly."""
        difference = self.difference(first, second)
        return difference.low > 0 or difference.high < 0

    def choose(self, outcomes: Sequence[TrialOutcome]) -> TrialOutcome:
        """Return the first completed trial whose loss cannot be distinguished from the best one.

        Args:
            outcomes: trial outcomes in order of preference.

        Raises:
            TrainingError: no trial completed.
        """
        complete = [outcome for outcome in outcomes if outcome.status is Status.COMPLETE]
        if not complete:
            whys = "; ".join(outcome.why or "" for outcome in outcomes)
            raise TrainingError(f"no trial completed: {whys}", todo="lower train.learning_rate in the recipe")
        best = min(complete, key=lambda outcome: outcome.mean)
        return next(outcome for outcome in complete if outcome is best or not self.distinct(outcome, best))
