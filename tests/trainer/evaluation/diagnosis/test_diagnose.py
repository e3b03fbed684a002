"""Tests that each fault is found in simulated runs that have it, and in almost no healthy run."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from svc.dataset.schema.objective import Objective
from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.finding import Finding, FindingKind
from svc.evaluation.intervals import Interval, proportion
from tests.svc.registry.manifests import exact_match_metrics
from tests.trainer.evaluation.diagnosis.simulated_run import RECIPE, Shape, answered, falling, simulate
from trainer.evaluation.diagnosis.diagnose import diagnose

LABELS = ["a", "b", "c", "d"] * 50


def kinds(run: Any) -> list[FindingKind]:
    return [finding.kind for finding in diagnose(run)]


def evaluation(hits: int, asked: int, nll: float = 0.2) -> EvaluationReport:
    return EvaluationReport(
        examples=asked,
        exact_match=proportion(hits, asked),
        valid_json=None,
        cut_off=proportion(0, asked),
        nll=Interval(value=nll, low=nll * 0.9, high=nll * 1.1),
        hits=(True,) * hits + (False,) * (asked - hits),
        seconds=1.0,
        metrics=exact_match_metrics(proportion(hits, asked)),
        primary="exact_match",
    )


def healthy(seed: int) -> Any:
    """Return a random healthy run: short or long, with large or small batches, on an easy or a hard task."""
    random = np.random.default_rng([seed, 1])
    start, speed = random.uniform(1, 4), random.uniform(5, 40)
    end = start * random.uniform(0.02, 0.4)
    gap = random.uniform(1.0, 1.5)
    return simulate(
        falling(start, end, speed),
        seed,
        steps=int(random.integers(20, 400)),
        noise=random.uniform(0.05, 0.6),
        heldout=falling(start, gap * end, speed),
        measured=int(random.choice([8, 16, 64])),
        spread=random.uniform(0.3, 1.0),
        evaluation=evaluation(150, 200, nll=gap * end),
        results=answered(200, seed, right=lambda place: 0.98 - 0.6 * place),
        answers=LABELS,
    )


@pytest.mark.slow
def test_diagnosis_reports_findings_for_fewer_than_2_percent_of_healthy_runs() -> None:
    false = {seed: findings for seed in range(600) if (findings := kinds(healthy(seed)))}
    assert len(false) < 12, false


def found_in(runs: int, kind: FindingKind, make: Any) -> int:
    return sum(kind in kinds(make(seed)) for seed in range(runs))


FAULTS = [
    (FindingKind.DIVERGENCE, lambda seed: simulate(lambda share: 2.0 + 0.8 * share, seed)),
    (FindingKind.LEARNING_RATE_HIGH, lambda seed: simulate(lambda share: 2.0 if 0.3 < share < 0.6 else 0.7, seed)),
    (FindingKind.LEARNING_RATE_HIGH, lambda seed: simulate(lambda share: 1.0 + 3 * share * (1 - share), seed)),
    (FindingKind.UNDERFITTING, lambda seed: simulate(falling(3, 0.1, 0.5), seed)),
    (
        FindingKind.LEARNING_RATE_LOW,
        lambda seed: simulate(falling(3, 0.1, 0.5), seed, recipe=RECIPE.changed({"train.learning_rate": 1e-5})),
    ),
    (
        FindingKind.LEARNING_RATE_LOW,
        lambda seed: simulate(lambda share: 3.0, seed, recipe=RECIPE.changed({"train.learning_rate": 1e-6})),
    ),
    (
        FindingKind.OVERFITTING,
        lambda seed: simulate(falling(3, 0.1, 5), seed, heldout=lambda share: falling(3, 1, 15)(share) + 0.4 * share),
    ),
    (
        FindingKind.TOO_LITTLE_DATA,
        lambda seed: simulate(
            falling(3, 0.02, 10), seed, heldout=falling(3, 0.5, 10), train_examples=120, evaluation=evaluation(90, 200)
        ),
    ),
    (
        FindingKind.LABEL_NOISE,
        lambda seed: simulate(
            falling(3, 0.3, 10),
            seed,
            results=answered(200, seed, right=lambda place: 0.98 - 0.6 * place, noise=0.2),
            answers=LABELS,
        ),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "make"), FAULTS, ids=lambda value: str(value) if isinstance(value, str) else None)
def test_diagnosis_detects_each_fault_in_at_least_90_percent_of_affected_runs(kind: FindingKind, make: Any) -> None:
    assert found_in(100, kind, make) >= 90


def only(run: Any) -> Finding:
    (finding,) = diagnose(run)
    return finding


WELL = falling(3, 0.2, 12)


def test_diagnosis_advice_names_the_recipe_key_with_its_current_and_proposed_values() -> None:
    finding = only(simulate(lambda share: 2.0 + 0.8 * share, 0))
    assert str(finding.advice) == "train.learning_rate from 0.0005 to 0.0002"
    assert "the training loss rose from " in finding.what
    assert "3 standard errors" in finding.rule


def test_overfitting_finding_names_the_epoch_of_the_lowest_loss() -> None:
    recipe = RECIPE.changed({"train.epochs": 10.0})
    run = simulate(
        falling(3, 0.1, 5), 0, heldout=lambda share: 1 + abs(share - 0.36), recipe=recipe, train_examples=5000
    )
    assert str(only(run).advice) == "train.epochs from 10 to 2"


def short(seed: int, *, heldout: bool) -> Any:
    """Return a nearly finished run with few steps and noisy losses, and with a small held-out set or none."""
    random = np.random.default_rng([seed, 2])
    steps, speed = int(random.integers(20, 60)), random.uniform(4, 8)
    run = simulate(falling(2, 0.8, speed), seed, steps=steps, noise=0.4, measured=8, spread=2.0)
    return run if heldout else unmeasured(run)


def unmeasured(run: Any) -> Any:
    """Return the same run without its held-out losses."""
    nothing = {"heldout_loss": None, "heldout_each": ()}
    return replace(run, curve=[point.model_copy(update=nothing) for point in run.curve if point.step])


@pytest.mark.slow
@pytest.mark.parametrize("heldout", [True, False])
def test_at_most_2_percent_of_healthy_runs_that_are_short_and_noisy_are_diagnosed_as_underfitted(heldout: bool) -> None:
    false = sum(FindingKind.UNDERFITTING in kinds(short(seed, heldout=heldout)) for seed in range(300))
    assert false <= 6


def test_diagnosis_advice_is_given_in_steps_when_the_recipe_sets_the_number_of_steps() -> None:
    recipe = RECIPE.changed({"train.steps": 100})
    run = simulate(falling(3, 0.1, 5), 0, heldout=lambda share: 1 + abs(share - 0.36), recipe=recipe)
    assert str(only(run).advice) == "train.steps from 100 to 20"


def test_overfitting_is_not_diagnosed_when_the_best_weights_are_kept() -> None:
    recipe = RECIPE.changed({"stopping.keep_best": True})
    run = simulate(falling(3, 0.1, 5), 0, heldout=lambda share: 1 + abs(share - 0.36), recipe=recipe)
    assert kinds(run) == []


def test_too_little_data_is_diagnosed_for_fewer_than_50_examples() -> None:
    finding = only(simulate(WELL, 0, train_examples=49))
    assert finding.kind is FindingKind.TOO_LITTLE_DATA
    assert str(finding.advice) == "data.train from 49 examples to 196 examples"
    limited = RECIPE.changed({"data.limit": 49})
    assert str(only(simulate(WELL, 0, train_examples=49, recipe=limited)).advice) == "data.limit from 49 to 196"


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"evaluate.limit": 30}, "evaluate.limit from 30 to 97"),
        ({"data.heldout": None, "data.heldout_share": 0.05}, "data.heldout_share from 0.05 to 0.16"),
        ({}, "data.heldout from 30 examples to 97 examples"),
    ],
)
def test_finding_about_a_small_heldout_set_states_the_required_size(values: dict[str, Any], advice: str) -> None:
    run = simulate(WELL, 0, evaluation=evaluation(15, 30), recipe=RECIPE.changed(values))
    assert only(run).kind is FindingKind.HELDOUT_TOO_SMALL
    assert str(only(run).advice) == advice


def test_raw_text_recipe_gets_no_finding_about_a_small_heldout_set() -> None:
    recipe = RECIPE.model_copy(update={"objective": Objective.TEXT})
    assert kinds(simulate(WELL, 0, evaluation=evaluation(0, 30), recipe=recipe)) == []


@pytest.mark.parametrize(("hits", "asked"), [(60, 120), (29, 30), (0, 30)])
def test_small_heldout_set_causes_no_finding_when_the_confidence_interval_is_narrow(hits: int, asked: int) -> None:
    assert kinds(simulate(WELL, 0, evaluation=evaluation(hits, asked))) == []


@pytest.mark.parametrize(
    ("value", "low", "high", "forgotten"),
    [(-0.1, -0.15, -0.05, True), (-0.1, -0.25, 0.05, False), (-0.01, -0.015, -0.005, False), (0.1, 0.05, 0.15, False)],
)
def test_forgetting_is_diagnosed_when_its_confidence_interval_excludes_zero(
    value: float, low: float, high: float, forgotten: bool
) -> None:
    run = simulate(WELL, 0, general_change=Interval(value=value, low=low, high=high))
    assert (kinds(run) == [FindingKind.FORGETTING]) is forgotten


def test_forgetting_advice_is_to_increase_the_share_of_general_examples_already_mixed_in() -> None:
    lost = Interval(value=-0.1, low=-0.15, high=-0.05)
    assert only(simulate(WELL, 0, general_change=lost)).advice.key == "data.general"
    mixed = simulate(WELL, 0, general_change=lost, recipe=RECIPE.changed({"data.general": "general.jsonl"}))
    assert str(only(mixed).advice) == "data.general_share from 0.1 to 0.2"


@pytest.mark.parametrize(("cut", "reported"), [(0, False), (2, False), (3, True), (100, True)])
def test_truncated_answers_are_diagnosed_when_they_exceed_2_percent(cut: int, reported: bool) -> None:
    run = simulate(WELL, 0, cut_off={"merged": proportion(0, 100), "gptq": proportion(cut, 100)})
    assert (kinds(run) == [FindingKind.ANSWERS_CUT_OFF]) is reported


def test_finding_about_truncated_answers_names_only_the_formats_above_the_threshold() -> None:
    finding = only(simulate(WELL, 0, cut_off={"merged": proportion(1, 100), "gptq": proportion(5, 100)}))
    assert finding.what.endswith(": 0.050 [0.022, 0.112] of gptq")
    assert "2%" in finding.rule


def test_advice_for_truncated_answers_is_to_raise_the_answer_limit_if_the_recipe_sets_one() -> None:
    cut = {"merged": proportion(5, 100)}
    fixed = only(simulate(WELL, 0, cut_off=cut, recipe=RECIPE.changed({"evaluate.max_tokens": 64})))
    assert str(fixed.advice).startswith("evaluate.max_tokens from 64 to 128, or null")
    by_reference = only(simulate(WELL, 0, cut_off=cut))
    assert by_reference.advice.key == "data.train"
    assert "train.epochs" in by_reference.advice.value


def test_label_noise_is_diagnosed_when_examples_contradict_each_other() -> None:
    run = simulate(WELL, 0, contradictions=40, answers=LABELS)
    assert only(run).kind is FindingKind.LABEL_NOISE
    assert "40 of 1200 training examples" in only(run).what
    assert kinds(simulate(WELL, 0, contradictions=20, answers=LABELS)) == []


def predicted(gain: float, shape: Shape = WELL, **more: Any) -> Any:
    """Return a run whose held-out loss is `gain` nats below the entropy of the labels."""
    results = answered(200, 0, right=lambda place: 0.3)
    nll = math.log(4) - gain
    return simulate(
        shape, 0, results=[result.model_copy(update={"nll": nll}) for result in results], answers=LABELS, **more
    )


def test_label_noise_is_diagnosed_when_prompts_do_not_predict_labels() -> None:
    assert only(predicted(0.0)).kind is FindingKind.LABEL_NOISE
    assert "learned nothing about how the labels depend on the prompts" in only(predicted(-0.3)).what


def test_high_learning_rate_is_diagnosed_when_far_above_default_and_nothing_is_learned() -> None:
    fast = RECIPE.changed({"train.learning_rate": 1.5e-2})
    assert str(only(replace(predicted(0.0), recipe=fast)).advice) == "train.learning_rate from 0.015 to 0.0005"


@pytest.mark.parametrize("gain", [0.0, 0.15])
def test_more_steps_are_advised_when_labels_are_barely_learned_and_loss_still_falls(gain: float) -> None:
    finding = only(predicted(gain, falling(3, 0.2, 5.5)))
    assert finding.kind is FindingKind.UNDERFITTING
    assert "how the labels depend on the prompts" in finding.what


def test_more_steps_are_advised_when_a_short_run_has_not_learned_its_labels() -> None:
    run = predicted(0.0)
    assert kinds(replace(run, curve=run.curve[:30])) == [FindingKind.UNDERFITTING]


def form_first(share: float) -> float:
    """Return a loss that falls fast for the form of an answer and slowly for its label."""
    return 2.5 * math.exp(-12 * share) + 0.4 - 0.2 * share


def settled(share: float) -> float:
    return 2.5 * math.exp(-12 * share) + 0.2


def test_more_steps_are_advised_when_half_the_labels_are_unlearned_and_loss_falls() -> None:
    finding = only(predicted(0.4, form_first, steps=30))
    assert finding.kind is FindingKind.UNDERFITTING
    assert "only part of how the labels depend on the prompts" in finding.what
    assert "held-out loss fell" in finding.rule


def test_diagnosis_reports_nothing_for_a_short_run_that_learned_most_labels() -> None:
    assert kinds(predicted(0.8, form_first, steps=30)) == []


def test_diagnosis_reports_nothing_when_heldout_loss_falls_slowly_in_a_run_of_50_steps() -> None:
    assert kinds(predicted(0.4, form_first, steps=50)) == []


def test_loss_plateau_in_a_short_run_on_a_hard_task_is_not_diagnosed_as_a_fault() -> None:
    assert kinds(predicted(0.4, settled, steps=30)) == []


def test_memorized_examples_do_not_count_as_learned_once_heldout_loss_has_converged() -> None:
    assert kinds(predicted(0.4, form_first, steps=30, heldout=settled)) == []


def test_short_run_without_measured_heldout_loss_is_diagnosed_by_training_loss() -> None:
    falling_late, done = (predicted(0.4, shape, steps=40, noise=0.05) for shape in (form_first, settled))
    assert "how the labels depend on the prompts" in only(unmeasured(falling_late)).what
    assert kinds(unmeasured(done)) == []


@pytest.mark.slow
def test_at_most_2_percent_of_converged_short_runs_on_hard_tasks_have_a_finding() -> None:
    """Half of the labels remain unknown however long the training takes."""
    draw = np.random.default_rng(3)
    runs = (simulate(settled, seed, steps=int(draw.integers(20, 50)), measured=20) for seed in range(300))
    hard = predicted(0.4)
    false = sum(bool(kinds(replace(run, results=hard.results, answers=hard.answers))) for run in runs)
    assert false <= 6


def test_high_learning_rate_is_diagnosed_when_far_above_default_and_loss_has_not_converged() -> None:
    run = simulate(falling(3, 0.1, 0.5), 1, recipe=RECIPE.changed({"train.learning_rate": 1.5e-2}))
    assert str(only(run).advice) == "train.learning_rate from 0.015 to 0.0005"


def test_label_noise_is_not_diagnosed_for_a_partly_learned_hard_task() -> None:
    assert kinds(predicted(0.2)) == []


def test_label_noise_is_not_diagnosed_for_differing_free_text_answers_to_one_prompt() -> None:
    assert kinds(simulate(WELL, 0, contradictions=600, answers=[f"text {place}" for place in range(200)])) == []


def test_label_noise_is_not_diagnosed_when_the_task_was_not_learned() -> None:
    results = answered(200, 0, right=lambda place: 0.6 - 0.3 * place)
    assert kinds(simulate(WELL, 0, results=results, answers=LABELS)) == []


@pytest.mark.parametrize(("shape", "findings"), [(WELL, [FindingKind.LABEL_NOISE]), (falling(3, 0.05, 5), [])])
def test_confident_wrong_answers_indicate_label_noise_only_after_training_loss_has_plateaued(
    shape: Shape, findings: list[FindingKind]
) -> None:
    results = answered(200, 0, right=lambda place: 0.98 - 0.6 * place, noise=0.2)
    assert kinds(simulate(shape, 0, results=results, answers=LABELS)) == findings


def test_memorization_is_not_diagnosed_when_all_answers_of_a_conversation_are_trained_on() -> None:
    """The loss of such answers may be lower because they are easier."""
    run = simulate(falling(3, 0.02, 10), 0, heldout=falling(3, 0.5, 10), train_examples=120)
    assert kinds(run) == [FindingKind.TOO_LITTLE_DATA]
    assert kinds(replace(run, learns_final_answers=False)) == []


@pytest.mark.parametrize(("epochs", "findings"), [(9.0, []), (10.0, [FindingKind.TOO_LITTLE_DATA])])
def test_smaller_loss_gap_suffices_to_diagnose_memorization_at_10_or_more_epochs(
    epochs: float, findings: list[FindingKind]
) -> None:
    recipe = RECIPE.changed({"train.epochs": epochs})
    shape, heldout = falling(3, 0.2, 12), falling(3, 0.38, 12)
    assert kinds(simulate(shape, 0, heldout=heldout, train_examples=120, recipe=recipe, measured=400)) == findings


def test_run_without_a_heldout_curve_is_diagnosed_by_the_rules_that_need_no_curve() -> None:
    run = replace(simulate(WELL, 0), curve=(), train_examples=20)
    assert kinds(run) == [FindingKind.TOO_LITTLE_DATA]


def test_diagnosis_reports_nothing_for_a_run_with_very_few_steps() -> None:
    assert kinds(simulate(lambda share: 1 + share, 0, steps=19)) == []
