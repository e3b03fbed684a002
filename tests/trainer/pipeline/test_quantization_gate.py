"""Tests that a quantized model is rejected if the primary metric or log-likelihood proves it to be worse."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from svc.errors import TrainingError
from svc.evaluation.evaluator import score_answers
from svc.evaluation.metrics.labels import MacroF1
from svc.evaluation.metrics.metric import Better, Metric, Unit
from svc.evaluation.metrics.text import ExactMatch, Rouge
from svc.evaluation.metrics.tokens import Perplexity
from svc.evaluation.results import ExampleResult
from svc.evaluation.verdict import GateOutcome, GateReport
from svc.version import Format
from tests.svc.registry.parity import SPEED
from tests.trainer.conftest import make_example
from trainer.evaluation.qualification import EngineReading, Qualified
from trainer.pipeline.quantization_gate import judge_quantized
from trainer.pipeline.registration import check_gate
from trainer.recipe.evaluate import Evaluate, Undecided

REFERENCE = "a short line that says what the package is for"


def qualified(answers: Sequence[str], nll: Sequence[float], *, metric: Metric | None = None) -> Qualified:
    """Return a format's results with these answers and negative log-likelihoods, one for each example."""
    results = [
        ExampleResult(
            answer=answer,
            tokens=2,
            limit=8,
            finish_reason="stop",
            logprob=-0.5,
            nll=value,
            scored=1,
            hit=answer == REFERENCE,
        )
        for answer, value in zip(answers, nll, strict=True)
    ]
    evaluation = score_answers(examples(len(results)), results, 1.0, [metric or ExactMatch()])
    return Qualified(
        evaluation=evaluation.report,
        results=evaluation.results,
        probes=(),
        reading=EngineReading(prompts_differ=(), scores=(), speed=SPEED),
    )


def examples(total: int) -> list[Any]:
    return [make_example("q", REFERENCE)] * total


def judged(
    merged: Qualified, gptq: Qualified, metric: Metric | None = None, **limits: float
) -> tuple[GateReport, GateReport]:
    total = merged.evaluation.examples
    return judge_quantized(Format.GPTQ, metric or ExactMatch(), examples(total), merged, gptq, Evaluate(**limits))


def check(merged: Qualified, gptq: Qualified, metric: Metric | None = None, **limits: float) -> None:
    for gate in judged(merged, gptq, metric, **limits):
        check_gate(gate, Undecided.WARN)


def won(hits: int, total: int) -> Qualified:
    """Return a format with the given number of right answers, all of which are equally likely."""
    return qualified([REFERENCE if index < hits else "no" for index in range(total)], [1.0] * total)


def likely(mean: float, *, spread: float = 0.02, seed: int = 0, total: int = 40) -> Qualified:
    """Return a format that never gives the reference, as with free text, with NLLs around a mean in nats/token."""
    generator = random.Random(seed)
    return qualified(["no"] * total, [mean + generator.uniform(-spread, spread) for _ in range(total)])


@pytest.mark.parametrize(
    ("merged", "gptq", "total", "most"),
    [
        *((156, 156, 200, 0.0), (156, 160, 200, 0.0), (200, 0, 200, 1.0), (0, 0, 200, 0.0)),
        (156, 145, 200, 0.05),  # 0.055, but 0.03 is possible too
        (10, 9, 10, 0.05),
    ],
)
def test_quantized_model_is_accepted_if_a_quality_loss_above_the_limit_is_not_proven(
    merged: int, gptq: int, total: int, most: float
) -> None:
    check(won(merged, total), won(gptq, total), max_gptq_loss=most)


@pytest.mark.parametrize(("merged", "gptq", "most"), [(160, 100, 0.05), (156, 130, 0.05), (20, 0, 0.0)])
def test_quantized_model_is_rejected_if_a_quality_loss_above_the_limit_is_proven(
    merged: int, gptq: int, most: float
) -> None:
    with pytest.raises(TrainingError, match="lowered exact match by"):
        check(won(merged, 200), won(gptq, 200), max_gptq_loss=most)


def test_error_states_the_scores_before_and_after_quantization_and_their_difference() -> None:
    with pytest.raises(TrainingError) as caught:
        check(won(160, 200), won(100, 200))
    assert "GPTQ lowered exact match by 0.300: 0.800 [" in caught.value.wrong
    assert "0.500 [" in caught.value.wrong
    assert "loss 0.300 [" in caught.value.wrong
    assert caught.value.expected == "at most 0.050 (evaluate.max_gptq_loss)"
    assert caught.value.todo


@pytest.mark.parametrize(("merged", "gptq"), [(0.1, 0.104), (2.0, 2.03), (2.0, 1.0)])
def test_quantized_model_passes_when_its_nll_increase_is_within_the_limit(merged: float, gptq: float) -> None:
    check(likely(merged), likely(gptq))


@pytest.mark.parametrize(("merged", "gptq"), [(0.1, 0.12), (2.0, 2.15), (2.0, 8.0)])
def test_free_text_model_is_rejected_when_reference_answers_become_less_likely(merged: float, gptq: float) -> None:
    with pytest.raises(TrainingError, match="makes the reference answers less likely"):
        check(likely(merged), likely(gptq))


def test_error_for_an_excessive_nll_increase_states_the_increase_and_the_limit() -> None:
    with pytest.raises(TrainingError) as caught:
        check(likely(2.0), likely(2.5), max_gptq_nll=0.1)
    assert "nats per token merged" in caught.value.wrong
    assert "loss 0.500 [0.500, 0.500]" in caught.value.wrong
    assert caught.value.expected.startswith("at most 0.200 (evaluate.max_gptq_nll")
    assert caught.value.todo


def test_nll_increase_is_accepted_after_the_recipe_raises_the_limit() -> None:
    check(likely(2.0), likely(2.1), max_gptq_nll=0.1)


@pytest.mark.slow
def test_at_most_5_percent_of_models_without_a_true_loss_are_rejected() -> None:
    """The interval covers 95%, and only one of its ends leads to rejection."""
    rejected = 0
    for seed in range(40):
        try:
            check(likely(2.0, spread=1.0, seed=seed), likely(2.0, spread=1.0, seed=1000 + seed))
        except TrainingError:
            rejected += 1
    assert rejected <= 2


def test_nll_gate_is_undecided_with_too_few_examples() -> None:
    _, nll = judged(likely(2.0, total=7), likely(9.0, total=7))
    assert (nll.verdict.outcome, nll.verdict.examples_to_decide) == (GateOutcome.UNDECIDED, 8)


def first_answers(lost: int, gained: int, total: int) -> tuple[Qualified, Qualified]:
    """Return formats that differ only on the first answers: first the lost answers, then the gained ones."""
    merged = [REFERENCE if not lost <= place < lost + gained else "no" for place in range(total)]
    gptq = [REFERENCE if place >= lost else "no" for place in range(total)]
    return qualified(merged, [1.0] * total), qualified(gptq, [1.0] * total)


@pytest.mark.parametrize(
    ("lost", "gained", "total", "wanted"),
    [
        (0, 0, 200, GateOutcome.PASSED),
        (2, 1, 200, GateOutcome.PASSED),
        (10, 4, 200, GateOutcome.UNDECIDED),  # three points of an ordinary first version
        (4, 0, 30, GateOutcome.UNDECIDED),  # 13%
        (0, 0, 30, GateOutcome.UNDECIDED),
        (30, 0, 200, GateOutcome.FAILED),
    ],
)
def test_quantization_loss_within_the_limit_passes_only_if_enough_examples_prove_it(
    lost: int, gained: int, total: int, wanted: GateOutcome
) -> None:
    loss, nll = judged(*first_answers(lost, gained, total))
    assert (loss.verdict.outcome, nll.verdict.outcome) == (wanted, GateOutcome.PASSED)


def test_warning_about_an_undecided_gate_states_the_number_of_examples_needed_to_decide(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(*first_answers(10, 4, 200))
    output = " ".join(capsys.readouterr().err.split())
    assert output.startswith("GPTQ lowered exact match by 0.030: 0.980 [")
    assert output.endswith(
        "undecided: a loss of up to 0.068 cannot be excluded with 200 examples; about 1,600 would decide"
    )


def test_corpus_metric_gate_is_undecided_with_few_examples_even_if_scores_are_equal() -> None:
    loss, _ = judged(won(20, 30), won(20, 30), MacroF1())
    assert (loss.verdict.loss.value, loss.verdict.outcome) == (0, GateOutcome.UNDECIDED)


def test_gate_report_states_the_gain_when_the_quantized_model_is_better() -> None:
    loss, _ = judged(won(100, 200), won(120, 200))
    assert loss.verdict.outcome is GateOutcome.PASSED
    assert loss.measured.startswith("GPTQ raised exact match by 0.100: 0.500 [")


def test_gate_report_states_no_change_when_both_models_have_the_same_score() -> None:
    loss, _ = judged(won(100, 200), won(100, 200))
    assert loss.measured.startswith("GPTQ left exact match unchanged: 0.500 [")


def written(kept: float, metric: Metric, nll: float = 1.0, total: int = 40) -> Qualified:
    """Return a format whose answers contain this share of the reference's words, but never all of them."""
    words = REFERENCE.split()
    answers = [" ".join([*words[: round(kept * len(words))], f"other{place}"]) for place in range(total)]
    return qualified(answers, [nll] * total, metric=metric)


def test_broken_free_text_model_is_rejected_even_if_exact_match_is_zero_for_both_models() -> None:
    metric = Rouge("L")
    merged, broken = written(0.8, metric), written(0.0, metric)
    assert merged.evaluation.exact_match.value == broken.evaluation.exact_match.value == 0.0
    with pytest.raises(TrainingError, match=r"GPTQ lowered ROUGE-L by 0\.\d+: 0\.\d+ \["):
        check(merged, broken, metric)


def test_quantized_free_text_model_passes_with_an_equal_score() -> None:
    metric = Rouge("L")
    check(written(0.8, metric), written(0.8, metric), metric)


def test_perplexity_limit_is_relative_to_the_merged_model() -> None:
    metric, merged = Perplexity(), likely(2.0)
    check(merged, likely(2.04), metric, max_gptq_nll=1.0)
    with pytest.raises(TrainingError, match=r"GPTQ raised perplexity by") as caught:
        check(merged, likely(2.1), metric, max_gptq_nll=1.0)
    assert "times the merged model's" in caught.value.expected


def test_quantized_model_is_rejected_when_a_corpus_metric_proves_a_loss() -> None:
    with pytest.raises(TrainingError, match="lowered macro-F1 by"):
        check(won(160, 200), won(100, 200), MacroF1())


class Points(Metric):
    """A user-defined metric with its own scale."""

    name = "points"
    title = "points"
    better = Better.HIGHER
    unit = Unit.NUMBER

    def score(self, answered: Any) -> list[float]:
        return [100.0 * len(answer.split()) for answer in answered.answers]


def test_custom_metric_limit_is_relative_to_the_merged_model() -> None:
    metric = Points()
    check(written(0.8, metric), written(0.8, metric), metric)
    with pytest.raises(TrainingError, match=r"GPTQ lowered points by 100\.000: 900\.000") as caught:
        check(written(0.8, metric), written(0.7, metric), metric)
    assert caught.value.expected.startswith("at most 45.000")
