"""Means over neighbouring steps with their errors: the loss of one batch says little."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from svc.evaluation.training_curve import TrainingPoint

FEWEST_STEPS = 20
"""Of a shorter run the curve says nothing."""
FEW_STEPS = 50
"""A run of fewer steps is short: its labels may be unknown only because of that, and its held-out loss is measured on
more examples."""
FEWEST_MEASURED = 8
"""Held-out examples; fewer tell nothing of the others."""
_SMALLEST, _SHARE = 5, 10  # steps, and the part of the run
_FIRST = 2
"""Steps before which nothing was learnt, or so little that it does not show: the rate still rises."""


@dataclass(frozen=True, slots=True)
class Window:
    """Neighbouring steps.

    Attributes:
        step: the last of them.
        mean: of their losses.
        error: the standard error of the mean.
    """

    step: int
    mean: float
    error: float

    def above(self, other: "Window") -> tuple[float, float]:
        """How far its mean is above another's, and the standard error of that."""
        return self.mean - other.mean, math.hypot(self.error, other.error)


def window_of(points: Sequence[TrainingPoint]) -> Window:
    """The window of these steps, two at least."""
    losses = [point.loss for point in points if point.loss is not None]
    return Window(points[-1].step, fmean(losses), stdev(losses) / math.sqrt(len(losses)))


def taken(curve: Sequence[TrainingPoint]) -> list[TrainingPoint]:
    """The points that are steps: not the one before the first."""
    return [point for point in curve if point.loss is not None]


def measured_points(curve: Sequence[TrainingPoint]) -> list[TrainingPoint]:
    """The points with held-out losses of examples enough, all of the same."""
    found = [point for point in curve if len(point.heldout_each) >= FEWEST_MEASURED]
    return [point for point in found if len(point.heldout_each) == len(found[-1].heldout_each)]


def width(steps: int) -> int:
    """How many steps a window has in a run of so many."""
    return max(_SMALLEST, steps // _SHARE)


def windows(curve: Sequence[TrainingPoint]) -> list[Window]:
    """The run in windows of a tenth of its steps, the last of which ends with it; none of a run that is too short."""
    steps = taken(curve)
    if len(steps) < FEWEST_STEPS:
        return []
    size = width(len(steps))
    ends = range(len(steps), size - 1, -size)
    return [window_of(steps[end - size : end]) for end in reversed(ends)]


def start_of(curve: Sequence[TrainingPoint]) -> Window:
    """The loss before training: of the first steps, which have changed little, or on held-out examples if that is more.

    The higher of the two, because a held-out set may be harder or easier than what is trained on.
    """
    steps = taken(curve)
    spread = stdev([point.loss or 0.0 for point in steps[: width(len(steps))]])
    first = Window(0, fmean(point.loss or 0.0 for point in steps[:_FIRST]), spread / math.sqrt(_FIRST))
    each = curve[0].heldout_each
    if curve[0].step > 0 or len(each) < 2:
        return first
    heldout = Window(0, fmean(each), stdev(each) / math.sqrt(len(each)))
    return max(first, heldout, key=lambda window: window.mean)
