"""Applies all diagnosis rules to a run. The rules are pure functions of the run's recipe and measurements, so the
same run always gets the same diagnosis.
"""

from svc.evaluation.finding import Advice, Finding, FindingKind
from trainer.evaluation.diagnosis.curve_rules import (
    find_divergence,
    find_high_rate,
    find_low_rate,
    find_underfitting,
)
from trainer.evaluation.diagnosis.heldout_rules import (
    find_cut_answers,
    find_overfitting,
    find_small_heldout,
    find_too_little_data,
)
from trainer.evaluation.diagnosis.label_rules import find_label_noise
from trainer.evaluation.diagnosis.training_run import TrainingRun

FORGOTTEN = 0.02
"""Minimum drop in score that counts as forgetting, for scores between 0 and 1. A smaller drop is not worth another
training run."""
_RULES = (find_divergence, find_high_rate, find_low_rate, find_overfitting, find_too_little_data)


def diagnose(run: TrainingRun) -> tuple[Finding, ...]:
    """Return the findings on a training run; a healthy run has none."""
    here = run.recipe.adapter.given is None  # nothing is known about training elsewhere
    findings = [finding for rule in _RULES if here and (finding := rule(run))]
    # The loss of memorized examples still falls, and each other fault makes a model unsure, or overconfident.
    for rule in (find_underfitting, find_label_noise):
        if here and not findings and (finding := rule(run)):
            findings.append(finding)
    return (
        *findings,
        *(finding for rule in (find_forgetting, find_small_heldout, find_cut_answers) if (finding := rule(run))),
    )


def find_forgetting(run: TrainingRun) -> Finding | None:
    """Return a finding if training lowered the score on general tasks."""
    change, share = run.general_change, run.recipe.data.general_share
    if change is None or change.high >= 0 or change.value > -FORGOTTEN:
        return None
    advice = (
        Advice(
            key="data.general",
            value="examples of other tasks, which by default make up a tenth of the training data (data.general_share)",
        )
        if run.recipe.data.general is None
        else Advice(key="data.general_share", before=f"{share:g}", value=f"{min(0.5, 2 * share):g}")
    )
    return Finding(
        kind=FindingKind.FORGETTING,
        what=f"the score on general tasks changed by {change}",
        advice=advice,
        rule=f"the 95% interval of the change is below 0, and the score fell by more than {FORGOTTEN:g}",
    )
