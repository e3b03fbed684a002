"""What the answers show of the labels: that some are wrong."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev

from svc.evaluation.diagnosis.curve_rules import USUAL_TIMES
from svc.evaluation.diagnosis.finding import Advice, Finding, FindingKind
from svc.evaluation.diagnosis.training_run import TrainingRun
from svc.evaluation.estimate import proportion
from svc.evaluation.results import ExampleResult

MOST_LABELS = 50
"""Different answers; with more the task is not one of labels. As `svc data check` has it."""
FEWEST_ASKED = 60
"""Held-out examples, so that a third of them are twenty."""
WRONG = 0.06
"""Share of the surest third of the answers. Of the section task 2 to 4 % are wrong there, and 25 to 35 % in all."""
LEARNT, SURE = 0.7, 0.88
"""Mean probability of the surest third, and of the surest sixth. A model below the first has not learnt its task. Where
labels are right some examples are easy, and the model is surer of them than the second: 0.96 on the section task. Wrong
labels that were drawn at random stand at easy examples too, and a model that has learnt their share is as unsure."""
CONTRADICTED = 0.02
GAINED = 0.05
"""Share of the entropy of the labels that the prompts explain: below it, the model has learnt only how frequent each
label is."""


def find_label_noise(run: TrainingRun) -> Finding | None:
    """The answers that the model is surest of are often not the reference, or the examples contradict each other."""
    if not _are_labels(run.answers):
        return None
    if run.train_examples and run.contradictions / run.train_examples > CONTRADICTED:
        return _finding(
            f"{run.contradictions} of {run.train_examples} training examples have the prompt of another one, "
            "and another answer"
        )
    if len(run.results) < FEWEST_ASKED:
        return None
    if all(one.scored for one in run.results) and (finding := _learnt_nothing(run)):
        return finding
    ordered = sorted(run.results, key=probability, reverse=True)
    third, sixth = ordered[: len(ordered) // 3], ordered[: len(ordered) // 6]
    wrong = proportion(sum(not one.hit for one in third), len(third))
    sure, surest = (fmean(map(probability, part)) for part in (third, sixth))
    if wrong.low <= WRONG or sure < LEARNT or surest > SURE:
        return None
    return _finding(
        f"of the {len(third)} held-out answers that the model is surest of (mean probability {sure:.2f}), "
        f"{wrong.value:.0%} [{wrong.low:.0%}, {wrong.high:.0%}] are not the reference"
    )


def _learnt_nothing(run: TrainingRun) -> Finding | None:
    """Return a finding if the model learnt nothing of its labels: they, or a rate that is too high, are at fault."""
    counts, asked = Counter(run.answers), len(run.answers)
    surprise = [-math.log(counts[answer] / asked) for answer in run.answers]
    gain = [known - one.nll * (one.scored or 0) for known, one in zip(surprise, run.results, strict=True)]
    most = fmean(gain) + 2 * stdev(gain) / math.sqrt(asked)
    if most > GAINED * fmean(surprise):
        return None
    what = (
        f"the prompts tell the model nothing of the labels: its loss on {asked} held-out answers is "
        f"{fmean(surprise) - fmean(gain):.3f} nats an answer, and {fmean(surprise):.3f} if each label is as "
        "probable as it is frequent"
    )
    settings = run.settings
    if settings.learning_rate < USUAL_TIMES * settings.usual_learning_rate:
        return _finding(what)
    return Finding(
        kind=FindingKind.LEARNING_RATE_HIGH,
        what=what,
        advice=Advice(
            key="train.learning_rate",
            before=f"{settings.learning_rate:g}",
            value=f"{settings.usual_learning_rate:g}",
        ),
        rule=f"the rate is at least {USUAL_TIMES:g} times the method's default, and the prompts explain beyond doubt "
        f"at most {GAINED:.0%} of the entropy of the labels",
    )


def probability(result: ExampleResult) -> float:
    """That the model gives its whole answer; 0 for an empty one."""
    return 0.0 if result.logprob is None else math.exp(result.logprob * result.tokens)


def _are_labels(answers: Sequence[str]) -> bool:
    return 1 < len(set(answers)) <= min(MOST_LABELS, len(answers) // 2)


def _finding(what: str) -> Finding:
    return Finding(
        kind=FindingKind.LABEL_NOISE,
        what=what,
        advice=Advice(key="data.train", value="correct or drop wrong labels: see `svc data check`"),
        rule=f"answers are labels, the run has none of the faults above; of {FEWEST_ASKED} or more held-out answers "
        f"the surest third has a mean probability of {LEARNT:g} or more, and beyond doubt more than {WRONG:.0%} of it "
        f"are wrong, and the surest sixth has one below {SURE:g}; or the prompts explain beyond doubt at most "
        f"{GAINED:.0%} of the entropy of the labels; or more than {CONTRADICTED:.0%} of the training "
        "examples contradict another",
    )
