"""Rules that detect wrong labels and labels that the model failed to learn."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev

from svc.evaluation.finding import Advice, Finding, FindingKind
from svc.evaluation.intervals import proportion
from svc.evaluation.results import ExampleResult
from trainer.callbacks.window import FEW_STEPS, measured_points, taken
from trainer.evaluation.diagnosis.curve_rules import USUAL_TIMES, late_windows, not_learnt
from trainer.evaluation.diagnosis.training_run import TrainingRun

MAX_LABELS = 50
"""Maximum number of distinct answers for a task to count as labeling. `svc data check` uses the same
limit."""
MIN_ASKED = 60
"""Minimum number of held-out results needed to check for wrong labels. The check uses only the most confident third of
the results, and therefore at least 20 of them."""
WRONG = 0.06
"""Maximum error rate of the most confident third of answers. If the rate is significantly higher, the labels are
suspect. On the Debian section task, it is 2 to 4%, compared with 25 to 35% for all answers."""
LEARNT, SURE = 0.7, 0.88
"""Thresholds for the mean probability of the most confident third and the most confident sixth of answers. A model
below the first threshold has not learned its task. With correct labels, some examples are easy, and the model's mean
probability for them exceeds the second threshold: it is 0.96 on the Debian section task. Randomly assigned wrong labels
affect easy examples too, so a model that has learned how often wrong labels occur is unsure even of easy
examples."""
STILL_LEARNING = 0.3
"""A model is still learning if, in the last third of training, its training loss falls by more than this share of the
final loss. Such a model is also unsure of correct labels. In 300 healthy runs, label noise was reported 5 times
without this limit and once with it. In 60 runs in which a fifth of the labels were wrong, label noise was reported 19
times without the limit and 15 times with it. The seeds of these runs start at 3000."""
CONTRADICTED = 0.02
GAINED = 0.05
"""Minimum share of the label entropy that a model must explain from the prompts. A model that explains less has learned
only how frequent each label is."""
HARDLY_GAINED, STILL_FALLING, LATE_SURE = 0.15, 0.15, 1.5
"""A model has hardly started to learn if the share of the label entropy that it explains is at most the first value.
More steps are expected to help if its training loss fell in the last third of training by more than the second value,
as a share of the final loss, and by more than the third value, in standard errors. If the labels do not depend on the
prompts, the loss falls by at most 7% (docs/diagnosis.md)."""
PARTLY_GAINED, HELDOUT_FALLING, HELDOUT_SURE = 0.5, 0.05, 2.0
"""After a short run, a model has learned only part of its task if the share of the label entropy that it explains is at
most the first value. More steps are expected to help if its held-out loss on the same examples fell in the second half
of the run by more than the second value, as a share of the final loss, and by more than the third value, in standard
errors."""


def find_label_noise(run: TrainingRun) -> Finding | None:
    """Return a finding if the model's most confident answers often differ from the reference, or if training
    examples contradict each other.
    """
    if not _are_labels(run.answers):
        return None
    if run.train_examples and run.contradictions / run.train_examples > CONTRADICTED:
        return _finding(
            f"{run.contradictions} of {run.train_examples} training examples have the same prompt as another example, "
            "but a different answer"
        )
    if len(run.results) < MIN_ASKED:
        return None
    if finding := _find_unlearnt(run):
        return finding
    ordered = sorted(run.results, key=probability, reverse=True)
    third, sixth = ordered[: len(ordered) // 3], ordered[: len(ordered) // 6]
    wrong = proportion(sum(not result.hit for result in third), len(third))
    sure, surest = (fmean(map(probability, part)) for part in (third, sixth))
    if wrong.low <= WRONG or sure < LEARNT or surest > SURE or _falls_late(run, STILL_LEARNING):
        return None
    return _finding(
        f"of the {len(third)} held-out answers in which the model is most confident (mean probability {sure:.2f}), "
        f"{wrong.value:.0%} [{wrong.low:.0%}, {wrong.high:.0%}] differ from the reference"
    )


def _find_unlearnt(run: TrainingRun) -> Finding | None:
    """Return a finding if the labels were not learned, naming the cause: a high learning rate, too few steps or
    wrong labels.
    """
    counts, asked = Counter(run.answers), len(run.answers)
    surprise = [-math.log(counts[answer] / asked) for answer in run.answers]
    gain = [known - result.nll * result.scored for known, result in zip(surprise, run.results, strict=True)]
    entropy, mean = fmean(surprise), fmean(gain)
    nothing = mean + 2 * stdev(gain) / math.sqrt(asked) <= GAINED * entropy
    amount = "nothing about" if nothing else "little about" if mean <= HARDLY_GAINED * entropy else "only part of"
    what = (
        f"the model learned {amount} how the labels depend on the prompts: its loss on {asked} held-out answers is "
        f"{entropy - mean:.3f} nats per answer; knowing only how frequent each label is would give {entropy:.3f}"
    )
    too_fast = run.learning_rate >= USUAL_TIMES * run.usual_learning_rate
    short = 0 < len(taken(run.curve)) < FEW_STEPS
    unfinished = short or _falls_late(run, STILL_FALLING, LATE_SURE)
    if mean <= HARDLY_GAINED * entropy and (unfinished or (nothing and too_fast)):
        return not_learnt(
            run,
            what,
            f"the prompts explain at most {HARDLY_GAINED:.0%} of the label entropy, and the run had fewer than "
            f"{FEW_STEPS} steps, or its training loss fell in the last third of training (by cumulative learning rate) "
            f"by more than {STILL_FALLING:.0%} of its final value and by more than {LATE_SURE:g} standard errors",
        )
    if short and mean <= PARTLY_GAINED * entropy and _still_falls(run):
        return not_learnt(
            run,
            what,
            f"the prompts explain at most {PARTLY_GAINED:.0%} of the label entropy, the run had fewer than {FEW_STEPS} "
            f"steps, and held-out loss fell in the second half of the run by more than {HELDOUT_FALLING:.0%} of its "
            f"final value and by more than {HELDOUT_SURE:g} standard errors",
        )
    return _finding(what) if nothing else None


def _still_falls(run: TrainingRun) -> bool:
    """Return whether the held-out loss was still falling in the second half of the run.

    If held-out loss was not measured in the first half of the run, the training loss is used instead. The training loss
    is only a fallback, because memorizing examples lowers it as well.
    """
    measured = measured_points(run.curve)
    middle = [point for point in measured if 0 < 2 * point.step <= measured[-1].step + 1]
    if not middle:
        return _falls_late(run, STILL_FALLING, LATE_SURE)
    end = measured[-1].heldout_each
    fall = [before - after for before, after in zip(middle[-1].heldout_each, end, strict=True)]
    error = stdev(fall) / math.sqrt(len(fall))
    return fmean(fall) > max(HELDOUT_FALLING * fmean(end), HELDOUT_SURE * error)


def _falls_late(run: TrainingRun, share: float, errors: float = 0.0) -> bool:
    """Return whether the training loss was still falling in the last third of training.

    Args:
        share: minimum decrease, as a share of the final loss.
        errors: minimum decrease, as a multiple of the decrease's standard error.
    """
    if not (parts := late_windows(run)):
        return False
    _, second, last = parts
    late, error = second.above(last)
    return late > max(share * last.mean, errors * error)


def probability(result: ExampleResult) -> float:
    """Return the probability of the model's complete answer, or 0 for an empty answer."""
    return 0.0 if result.logprob is None else math.exp(result.logprob * result.tokens)


def _are_labels(answers: Sequence[str]) -> bool:
    return 1 < len(set(answers)) <= min(MAX_LABELS, len(answers) // 2)


def _finding(what: str) -> Finding:
    return Finding(
        kind=FindingKind.LABEL_NOISE,
        what=what,
        advice=Advice(key="data.train", value="correct or drop the examples with wrong labels; see `svc data check`"),
        rule=f"the answers are labels, no other training fault was found, and one of three conditions holds: (1) there "
        f"are at least {MIN_ASKED} held-out answers, the most confident third of them has a mean probability of at "
        f"least {LEARNT:g} but an error rate significantly above {WRONG:.0%}, the most confident sixth has a mean "
        f"probability of at most {SURE:g}, and the training loss fell by at most {STILL_LEARNING:.0%} of its final "
        f"value in the last third of training (by cumulative learning rate); (2) the prompts "
        f"explain significantly less than {GAINED:.0%} of the label entropy; (3) more than {CONTRADICTED:.0%} of the "
        "training examples contradict another example",
    )
