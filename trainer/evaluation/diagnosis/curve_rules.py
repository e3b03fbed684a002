"""Diagnosis rules for the training loss curve. They detect divergence, a learning rate that is too high or
too low, and underfitting.
"""

import math
from itertools import accumulate
from statistics import fmean, stdev

from svc.evaluation.finding import Advice, Finding, FindingKind
from trainer.callbacks.window import Window, start_of, taken, width, window_of, windows
from trainer.evaluation.diagnosis.training_run import TrainingRun

SURE = 3.0
"""Number of standard errors above which a difference between the mean losses of two windows of steps is not attributed
to chance. Because many pairs of windows are compared, a difference must also be large."""
ABOVE_START = 0.1
"""Smallest increase in the loss that is reported, as a share of the loss at the start. A smaller increase does not
justify another training run."""
GIVEN_BACK = 0.25
"""A rise of the loss is reported only if it undoes more than this share of the preceding decrease. Hard batches alone
cause smaller rises."""
UNFINISHED_SHARE, HELDOUT_SHARE = 0.2, 0.12
"""Training counts as unfinished if the last third of training contributed more than these shares to the total reduction
of the training loss and of the held-out loss. If a loss approaches its limit exponentially and a fifth of its total
reduction falls in the last third, it has come three quarters of the way to the limit."""
LATE_SURE = 2.0
"""Number of standard errors by which the loss must decrease in the last third of training for training to count as
unfinished. If the held-out loss was measured often enough, it is compared example by example, and only the decrease
beyond `HELDOUT_SHARE` counts. Otherwise, the training loss is used. Because only one comparison is made, fewer standard
errors are enough than when many pairs of windows are compared."""
USUAL_TIMES = 3.0
"""Factor by which a learning rate must differ from the usual rate to count as the cause of a finding. Adjacent rates in
a sweep differ by this factor."""


def find_divergence(run: TrainingRun) -> Finding | None:
    """Return a finding if the loss at the end is above the loss at the start."""
    parts = windows(run.curve)
    if not parts:
        return None
    starts = (start_of(run.curve), parts[0])
    start = next((window for window in starts if _is_above(parts[-1], window, ABOVE_START * window.mean)), None)
    if start is None:
        return None
    return Finding(
        kind=FindingKind.DIVERGENCE,
        what=f"the training loss rose from {start.mean:.3f} at the start to {parts[-1].mean:.3f} at the end",
        advice=_slower(run),
        rule="the mean loss over the last tenth of the steps exceeds either the mean over the first tenth or the loss "
        f"before the first step by more than {SURE:g} standard errors and by more than {ABOVE_START:.0%}",
    )


def find_high_rate(run: TrainingRun) -> Finding | None:
    """Return a finding if the loss rose far above an earlier value during the run but did not diverge."""
    parts = windows(run.curve)
    if not parts or find_divergence(run):
        return None
    start = start_of(run.curve)
    lowest, worst = max(_pairs([start, *parts]), key=lambda pair: pair[1].mean - pair[0].mean)
    if not _is_above(worst, lowest, max(ABOVE_START * start.mean, GIVEN_BACK * (start.mean - lowest.mean))):
        return None
    return Finding(
        kind=FindingKind.LEARNING_RATE_HIGH,
        what=f"the training loss rose from {lowest.mean:.3f} at step {lowest.step} to {worst.mean:.3f} at step "
        f"{worst.step}, then fell to {parts[-1].mean:.3f}",
        advice=_slower(run),
        rule="if the steps are divided into ten parts, the mean loss of one part exceeds that of an earlier part, or "
        f"the loss before the first step, by more than {SURE:g} standard errors, by more than {ABOVE_START:.0%} of "
        f"the loss before the first step, and by more than {GIVEN_BACK:.0%} of the preceding decrease",
    )


def find_low_rate(run: TrainingRun) -> Finding | None:
    """Return a finding if the loss hardly fell or was still falling at the end, and the learning rate is far
    below the usual rate.
    """
    if run.learning_rate * USUAL_TIMES > run.usual_learning_rate:
        return None
    parts = windows(run.curve)
    if not parts:
        return None
    fall, error = parts[0].above(parts[-1])
    flat = fall <= SURE * error
    if not flat and not _unfinished(run):
        return None
    change = f"from {parts[0].mean:.3f} at the start to {parts[-1].mean:.3f} at the end"
    return Finding(
        kind=FindingKind.LEARNING_RATE_LOW,
        what=f"the training loss hardly fell: {change}" if flat else f"the training loss was still falling, {change}",
        advice=_other_rate(run, f"{run.usual_learning_rate:g}"),
        rule=f"the learning rate is at most a third of the method's default, and either the loss did not decrease, or "
        f"more than {UNFINISHED_SHARE:.0%} of its decrease occurred in the last third of training (by cumulative "
        "learning rate)",
    )


def find_underfitting(run: TrainingRun) -> Finding | None:
    """Return a finding if the loss was still falling at the end, unless the learning rate is far below usual."""
    if run.learning_rate * USUAL_TIMES <= run.usual_learning_rate or not (ends := _unfinished(run)):
        return None
    first, two_thirds, last = ends
    return not_learnt(
        run,
        f"the training loss was still falling when the run ended: {first.mean:.3f} at the start, "
        f"{two_thirds.mean:.3f} after two thirds of training, {last.mean:.3f} at the end",
        f"more than {UNFINISHED_SHARE:.0%} of the decrease in training loss and more than {HELDOUT_SHARE:.0%} of the "
        "decrease in held-out loss occurred in the last third of training (by cumulative learning rate)",
    )


def not_learnt(run: TrainingRun, what: str, rule: str) -> Finding:
    """Return a finding that blames the learning rate if it is far above the default, and too few steps otherwise."""
    train = run.recipe.train
    if run.learning_rate >= USUAL_TIMES * run.usual_learning_rate:
        return Finding(
            kind=FindingKind.LEARNING_RATE_HIGH,
            what=what,
            advice=_other_rate(run, f"{run.usual_learning_rate:g}"),
            rule=f"the learning rate is at least {USUAL_TIMES:g} times the method's default, and {rule}",
        )
    if train.steps is not None:
        advice = Advice(key="train.steps", before=str(train.steps), value=str(2 * train.steps))
    else:
        advice = Advice(key="train.epochs", before=f"{train.epochs:g}", value=f"{2 * train.epochs:g}")
    return Finding(kind=FindingKind.UNDERFITTING, what=what, advice=advice, rule=rule)


def late_windows(run: TrainingRun) -> tuple[Window, Window, Window] | None:
    """Return the windows of losses at the start, at two thirds and at the end of training, or None if the run is
    too short.

    Progress is measured by the sum of the learning rates instead of the number of steps, because a learning rate that
    decays to 0 makes the loss of every run level off.
    """
    steps = taken(run.curve)
    if not windows(run.curve):
        return None
    size = width(len(steps))
    sums = list(accumulate(point.learning_rate or 0.0 for point in steps))
    end = next(count for count, total in enumerate(sums, start=1) if total >= sums[-1] * 2 / 3)
    if not 2 * size <= end <= len(steps) - size:
        return None
    first, second, last = (window_of(steps[at - size : at]) for at in (size, end, len(steps)))
    return first, second, last


def _unfinished(run: TrainingRun) -> tuple[Window, Window, Window] | None:
    """Return the result of `late_windows` if too much of the loss reduction came after two thirds of training.
    Otherwise, return None.
    """
    parts = late_windows(run)
    if not parts or find_high_rate(run):  # a loss that was thrown off falls while it recovers
        return None
    first, second, last = parts
    fall, error = first.above(last)
    late, late_error = second.above(last)
    if fall <= SURE * error or late <= UNFINISHED_SHARE * fall:
        return None
    heldout = _late_heldout(run, second.step)
    sure = late > LATE_SURE * late_error if heldout is None else heldout
    return parts if sure else None


def _late_heldout(run: TrainingRun, step: int) -> bool | None:
    """Return whether much of the reduction in held-out loss came after the given step, or None if held-out loss was not
    measured both before and after this step.
    """
    points = [point for point in run.curve if len(point.heldout_each) > 1]
    measured = [point for point in points if len(point.heldout_each) == len(points[-1].heldout_each)]
    before = [point for point in measured if point.step <= step]
    if len(before) < 2 or measured[0].step > 0 or measured[-1].step <= step:
        return None
    examples = zip(before[0].heldout_each, before[-1].heldout_each, measured[-1].heldout_each, strict=True)
    excess = [middle - end - HELDOUT_SHARE * (start - end) for start, middle, end in examples]
    return fmean(excess) > LATE_SURE * stdev(excess) / math.sqrt(len(excess))


def _pairs(parts: list[Window]) -> list[tuple[Window, Window]]:
    """Pair each window of the training curve with the one that has the lowest mean loss among all earlier windows and
    the window itself. The lowest comes first in each pair.
    """
    return [(min(parts[: index + 1], key=lambda part: part.mean), window) for index, window in enumerate(parts)]


def _is_above(window: Window, other: Window, least: float) -> bool:
    """Return whether a window's mean exceeds another's by more than `least` and by more than chance explains."""
    difference, error = window.above(other)
    return difference > max(SURE * error, least)


def _slower(run: TrainingRun) -> Advice:
    """Return advice to lower the learning rate. A run that is stopped because it diverges gets the same advice
    (trainer.callbacks.divergence).
    """
    return _other_rate(run, f"{run.learning_rate / 3:.1g}")


def _other_rate(run: TrainingRun, value: str) -> Advice:
    return Advice(key="train.learning_rate", before=f"{run.learning_rate:g}", value=value)
