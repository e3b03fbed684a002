"""Mean losses over windows of consecutive steps, and their standard errors. The loss of a single batch is too noisy to
interpret.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from trainer.training_curve import TrainingPoint

MIN_STEPS = 20
"""Minimum number of steps needed to interpret a loss curve."""
FEW_STEPS = 50
"""Number of steps below which a run counts as short. If a model has not learned the labels of its task,
a short run may be the reason. The held-out loss of a short run is measured on more examples."""
MIN_MEASURED = 8
"""Minimum number of held-out examples in a loss measurement. Fewer examples are not representative."""
_MIN_WIDTH, _SHARE = 5, 10  # steps, and the divisor of the run's steps
_FIRST = 2
"""Number of initial steps whose loss does not reflect any learning yet, because the learning rate is still
rising."""


@dataclass(frozen=True, slots=True)
class Window:
    """Mean loss over consecutive steps.

    Attributes:
        step: the last step in the window.
        mean: mean of the losses.
        error: standard error of the mean.
    """

    step: int
    mean: float
    error: float

    def above(self, other: "Window") -> tuple[float, float]:
        """Return the mean of this window minus the mean of another window, and the standard error of the difference."""
        return self.mean - other.mean, math.hypot(self.error, other.error)


def window_of(points: Sequence[TrainingPoint]) -> Window:
    """Summarize the losses of the given steps as a window. At least two steps are required."""
    losses = [point.loss for point in points if point.loss is not None]
    return Window(points[-1].step, fmean(losses), stdev(losses) / math.sqrt(len(losses)))


def taken(curve: Sequence[TrainingPoint]) -> list[TrainingPoint]:
    """Return the points recorded at training steps, excluding the measurement before the first step."""
    return [point for point in curve if point.loss is not None]


def measured_points(curve: Sequence[TrainingPoint]) -> list[TrainingPoint]:
    """Return the points whose held-out loss was measured on enough examples. Points that were not measured on the same
    examples as the last point are excluded.
    """
    points = [point for point in curve if len(point.heldout_each) >= MIN_MEASURED]
    return [point for point in points if len(point.heldout_each) == len(points[-1].heldout_each)]


def width(steps: int) -> int:
    """Return the number of steps per window of the loss curve of a run with `steps` steps."""
    return max(_MIN_WIDTH, steps // _SHARE)


def windows(curve: Sequence[TrainingPoint]) -> list[Window]:
    """Split a loss curve into windows that each contain a tenth of its steps, aligned to the end of the curve. The
    result is empty if the run is too short.
    """
    steps = taken(curve)
    if len(steps) < MIN_STEPS:
        return []
    size = width(len(steps))
    ends = range(len(steps), size - 1, -size)
    return [window_of(steps[end - size : end]) for end in reversed(ends)]


def start_of(curve: Sequence[TrainingPoint]) -> Window:
    """Return the loss before training: the mean training loss over the first steps or the mean held-out loss before the
    first step, whichever is higher.

    The higher value is used because a held-out set may be harder or easier than the training examples.
    """
    steps = taken(curve)
    spread = stdev([point.loss or 0.0 for point in steps[: width(len(steps))]])
    first = Window(0, fmean(point.loss or 0.0 for point in steps[:_FIRST]), spread / math.sqrt(_FIRST))
    each = curve[0].heldout_each
    if curve[0].step > 0 or len(each) < 2:
        return first
    heldout = Window(0, fmean(each), stdev(each) / math.sqrt(len(each)))
    return max(first, heldout, key=lambda window: window.mean)
