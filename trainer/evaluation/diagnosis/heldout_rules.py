"""Diagnosis rules for the held-out set. They detect overfitting, too little data, a held-out set that is
too small, and cut-off answers.
"""

import math
from statistics import fmean, stdev

from svc.dataset.schema.objective import Objective
from svc.evaluation.finding import Advice, Finding, FindingKind
from trainer.callbacks.window import measured_points, start_of, taken, width, window_of, windows
from trainer.evaluation.diagnosis.training_run import TrainingRun
from trainer.recipe.train import Train
from trainer.training_curve import TrainingPoint

FALSE_ALARMS = 0.05
"""Acceptable share of healthy runs in which the paired test alone finds a rise in held-out loss. For each test, it is
divided by the number of comparisons (Bonferroni correction)."""
RISE = 0.1
"""Overfitting is reported only if held-out loss rises by more than this share of its lowest value. A smaller rise does
not justify another training run."""
FEW_EXAMPLES = 50
"""Number of examples below which a data set is small: OpenAI's fine-tuning guide reports clear
improvements with 50 to 100 examples."""
MANY_EXAMPLES = 1000
GAP, GAP_OF_MANY_EPOCHS, MANY_EPOCHS = 2.0, 1.5, 10
"""Ratio of held-out to training loss above which a model is considered to have memorized its examples. The second value
applies from MANY_EPOCHS epochs on: a model that has seen an example ten times has memorized it, so a smaller gap is
enough. Among 20 runs of 20 epochs on 60 examples, the first ratio detected 16 runs and the second 18
(benchmarks.diagnosis, seeds 3000 to 3019)."""
WIDEST = 0.2
"""Maximum width of the 95% confidence interval of exact match. With a wider interval, a drop of ten percentage
points could go unnoticed."""

CUT_OFF = 0.02
"""A finding is reported if more than this share of a format's answers are cut off at their token limit. A smaller
share barely changes the metrics."""


def find_overfitting(run: TrainingRun) -> Finding | None:
    """Return a finding if held-out loss rose after its lowest point while the training loss kept falling."""
    measured = measured_points(run.curve)
    if run.recipe.stopping.keep_best or len(measured) < 2:
        return None
    lowest, last = min(measured, key=lambda point: point.heldout_loss or 0.0), measured[-1]
    rise = [after - before for before, after in zip(lowest.heldout_each, last.heldout_each, strict=True)]
    mean_rise = fmean(rise)
    if lowest is last or mean_rise <= RISE * fmean(lowest.heldout_each) or not _fell_between(run, lowest, last):
        return None
    error = stdev(rise) / math.sqrt(len(rise))
    if mean_rise <= _critical(len(rise), len(measured) - 1) * error:
        return None
    return Finding(
        kind=FindingKind.OVERFITTING,
        what=f"held-out loss rose from {lowest.heldout_loss:.3f} at epoch {lowest.epoch:.1f} to "
        f"{last.heldout_loss:.3f} at the end, by {mean_rise:.3f} [±{2 * error:.3f}] on the same {len(rise)} examples, "
        "while the training loss fell",
        advice=_stop_earlier(run.recipe.train, lowest),
        rule=f"held-out loss rose by more than {RISE:.0%} from its lowest point while the training loss fell; such a "
        f"rise happens by chance in fewer than one in {1 / FALSE_ALARMS:.0f} runs (paired t-test over the examples, "
        "Bonferroni over the measurements)",
    )


def find_too_little_data(run: TrainingRun) -> Finding | None:
    """Return a finding if there are very few training examples, or if they are few and the model has memorized them."""
    limit, count = run.recipe.data.limit, run.train_examples
    if count < FEW_EXAMPLES:
        what = f"there are only {count} training examples"
    elif count < MANY_EXAMPLES and (gap := _gap(run)) and gap[1] > _least_gap(run) * gap[0]:
        what = (
            f"{count} training examples were memorized: at the end, their loss is {gap[0]:.3f}, but the loss on "
            f"held-out examples is at least {gap[1]:.3f}"
        )
    else:
        return None
    wanted = max(2 * FEW_EXAMPLES, 4 * count)
    limited = limit is not None and count >= limit
    return Finding(
        kind=FindingKind.TOO_LITTLE_DATA,
        what=what,
        advice=Advice(
            key="data.limit" if limited else "data.train",
            before=str(count) if limited else f"{count} examples",
            value=str(wanted) if limited else f"{wanted} examples",
        ),
        rule=f"one of two conditions holds: (1) there are fewer than {FEW_EXAMPLES} training examples; (2) there are "
        f"fewer than {MANY_EXAMPLES}, training ran for more than one epoch, and the 95% interval of held-out loss lies "
        f"above {GAP:g} times the final training loss ({GAP_OF_MANY_EPOCHS:g} times if training ran for at least "
        f"{MANY_EPOCHS} epochs)",
    )


def find_small_heldout(run: TrainingRun) -> Finding | None:
    """Return a finding if exact match on the held-out set is too uncertain to compare versions. Raw-text runs get no
    finding, because exact match does not apply to them.
    """
    if run.evaluation is None or run.recipe.objective is Objective.TEXT:
        return None
    match, asked, data = run.evaluation.exact_match, run.evaluation.examples, run.recipe.data
    if match.high - match.low <= WIDEST:
        return None
    # With few asked examples, the estimated width is uncertain too: a share of one half is the worst case.
    wanted = math.ceil((2 * 1.96 * 0.5 / WIDEST) ** 2)
    limit = run.recipe.evaluate.limit
    if limit is not None and limit <= asked:
        advice = Advice(key="evaluate.limit", before=str(limit), value=str(wanted))
    elif data.heldout is None:
        share = min(0.3, data.heldout_share * wanted / asked)
        advice = Advice(key="data.heldout_share", before=f"{data.heldout_share:g}", value=f"{share:.2g}")
    else:
        advice = Advice(key="data.heldout", before=f"{asked} examples", value=f"{wanted} examples")
    return Finding(
        kind=FindingKind.HELDOUT_TOO_SMALL,
        what=f"with {asked} held-out examples, exact match is too uncertain to compare versions: {match}",
        advice=advice,
        rule=f"the 95% interval of exact match is wider than {WIDEST:g}",
    )


def find_cut_answers(run: TrainingRun) -> Finding | None:
    """Return a finding if, for any format, more than `CUT_OFF` of the answers were cut off at their token limit."""
    cut = {format: share for format, share in run.cut_off.items() if share.value > CUT_OFF}
    if not cut:
        return None
    fixed = run.recipe.evaluate.max_tokens
    if fixed is None:
        advice = Advice(
            key="data.train",
            value="read the truncated answers (`svc report`): if they continue after the reference, check that every "
            "training answer is complete, then train longer (train.epochs); if they repeat themselves, train longer or "
            "with a lower train.learning_rate; if they are right up to the cut, raise evaluate.max_tokens",
        )
    else:
        advice = Advice(
            key="evaluate.max_tokens",
            before=str(fixed),
            value=f"{2 * fixed}, or null for limits that depend on each reference; if just as many answers are "
            "still cut off, the model fails to end its answers",
        )
    shares = ", ".join(f"{share} of {format}" for format, share in cut.items())
    return Finding(
        kind=FindingKind.ANSWERS_CUT_OFF,
        what=f"share of held-out answers cut off at their token limit: {shares}",
        advice=advice,
        rule=f"for at least one format of the model, more than {CUT_OFF:.0%} of the held-out answers were cut off at "
        "their token limit",
    )


def _critical(examples: int, comparisons: int) -> float:
    from scipy.stats import t

    return float(t.isf(FALSE_ALARMS / comparisons, examples - 1))


def _fell_between(run: TrainingRun, lowest: TrainingPoint, last: TrainingPoint) -> bool:
    """Return whether the training loss fell after the step with the lowest held-out loss, and ended below the
    loss before training (see `start_of`).
    """
    steps = taken(run.curve)
    size = width(len(steps))
    until = [point for point in steps if point.step <= max(lowest.step, size)][-size:]
    after = [point for point in steps if point.step <= last.step][-size:]
    if min(len(until), len(after)) < 2:
        return False
    return window_of(after).mean < min(window_of(until).mean, start_of(run.curve).mean)


def _stop_earlier(train: Train, lowest: TrainingPoint) -> Advice:
    if lowest.step == 0:
        return Advice(key="stopping.keep_best", before="false", value="true")
    if train.steps is not None:
        return Advice(key="train.steps", before=str(train.steps), value=str(lowest.step))
    return Advice(key="train.epochs", before=f"{train.epochs:g}", value=f"{lowest.epoch:.2g}")


def _least_gap(run: TrainingRun) -> float:
    return GAP_OF_MANY_EPOCHS if run.curve[-1].epoch >= MANY_EPOCHS else GAP


def _gap(run: TrainingRun) -> tuple[float, float] | None:
    """Return the final training loss and a lower bound of the held-out loss, in nats per token.

    The result is None if the run ended within the first epoch, because the training loss on an example that is seen for
    the first time is itself a held-out loss. It is also None if the training loss covers answers other than the
    final answers, because the two losses are then not comparable, or if there are too few measurements.
    """
    parts = windows(run.curve)
    if not parts or run.curve[-1].epoch <= 1.0 or not run.learns_final_answers:
        return None
    if run.evaluation is not None:
        return parts[-1].mean, run.evaluation.nll.low
    measured = measured_points(run.curve)
    if not measured:
        return None
    each = measured[-1].heldout_each
    return parts[-1].mean, fmean(each) - 2 * stdev(each) / math.sqrt(len(each))
