"""A quantized model that is proven worse is refused, by the primary metric and by the log-likelihood."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from svc.errors import TrainingError
from svc.evaluation.evaluator import judge
from svc.evaluation.metrics.labels import MacroF1
from svc.evaluation.metrics.metric import Better, Metric, Unit
from svc.evaluation.metrics.text import ExactMatch, Rouge
from svc.evaluation.metrics.tokens import Perplexity
from svc.evaluation.results import ExampleResult
from svc.evaluation.verdict import GateOutcome, GateReport
from tests.svc.registry.parity import SPEED
from tests.trainer.conftest import make_example
from trainer.pipeline.gate import check_gate
from trainer.pipeline.gptq_gate import judge_gptq
from trainer.qualification import EngineReading, Qualified
from trainer.recipe.sections import Evaluate, Undecided

REFERENCE = "a short line that says what the package is for"


def qualified(answers: Sequence[str], nll: Sequence[float], *, metric: Metric | None = None) -> Qualified:
    """What was found of a format; one answer and one negative log-likelihood for each example."""
    found = [
        ExampleResult(
            answer=answer,
            tokens=2,
            limit=8,
            finish_reason="stop",
            logprob=-0.5,
            nll=one,
            scored=1,
            hit=answer == REFERENCE,
        )
        for answer, one in zip(answers, nll, strict=True)
    ]
    judged = judge(examples(len(found)), found, 1.0, [metric or ExactMatch()])
    return Qualified(
        evaluation=judged.report,
        results=judged.results,
        probes=(),
        reading=EngineReading(prompts_differ=(), scores=(), speed=SPEED),
    )


def examples(total: int) -> list[Any]:
    return [make_example("q", REFERENCE)] * total


def judged(
    merged: Qualified, gptq: Qualified, metric: Metric | None = None, **limits: float
) -> tuple[GateReport, GateReport]:
    total = merged.evaluation.examples
    return judge_gptq(metric or ExactMatch(), examples(total), merged, gptq, Evaluate(**limits))


def check(merged: Qualified, gptq: Qualified, metric: Metric | None = None, **limits: float) -> None:
    for gate in judged(merged, gptq, metric, **limits):
        check_gate(gate, Undecided.WARN)


def won(hits: int, total: int) -> Qualified:
    """A format that gives so many of the right answers, and finds all equally likely."""
    return qualified([REFERENCE if index < hits else "no" for index in range(total)], [1.0] * total)


def likely(mean: float, *, spread: float = 0.02, seed: int = 0, total: int = 40) -> Qualified:
    """A format that never gives the reference, as with free text, and finds it likely around a mean, nats a token."""
    generator = random.Random(seed)
    return qualified(["no"] * total, [mean + generator.uniform(-spread, spread) for _ in range(total)])


@pytest.mark.parametrize(
    ("merged", "gptq", "total", "most"),
    [
        *((156, 156, 200, 0.0), (156, 160, 200, 0.0), (200, 0, 200, 1.0), (0, 0, 200, 0.0)),
        (156, 145, 200, 0.05),  # 0.055, and it may as well be 0.03
        (10, 9, 10, 0.05),
    ],
)
def test_lost_answers_are_not_refused_when_no_loss_beyond_the_limit_is_proven(
    merged: int, gptq: int, total: int, most: float
) -> None:
    check(won(merged, total), won(gptq, total), max_gptq_loss=most)


@pytest.mark.parametrize(("merged", "gptq", "most"), [(160, 100, 0.05), (156, 130, 0.05), (20, 0, 0.0)])
def test_lost_answers_are_refused_when_a_loss_beyond_the_limit_is_proven(merged: int, gptq: int, most: float) -> None:
    with pytest.raises(TrainingError, match="of exact match"):
        check(won(merged, 200), won(gptq, 200), max_gptq_loss=most)


def test_a_refused_loss_gives_both_figures_and_their_difference() -> None:
    with pytest.raises(TrainingError) as caught:
        check(won(160, 200), won(100, 200))
    assert "GPTQ lost 0.300 of exact match: 0.800 [" in caught.value.wrong
    assert "0.500 [" in caught.value.wrong
    assert "loss 0.300 [" in caught.value.wrong
    assert caught.value.expected == "at most 0.050 (evaluate.max_gptq_loss)"
    assert caught.value.todo


@pytest.mark.parametrize(("merged", "gptq"), [(0.1, 0.104), (2.0, 2.03), (2.0, 1.0)])
def test_less_likely_answers_within_the_limits_pass(merged: float, gptq: float) -> None:
    check(likely(merged), likely(gptq))


@pytest.mark.parametrize(("merged", "gptq"), [(0.1, 0.12), (2.0, 2.15), (2.0, 8.0)])
def test_a_model_of_free_text_that_finds_the_right_answers_less_likely_is_refused(merged: float, gptq: float) -> None:
    with pytest.raises(TrainingError, match="finds the right answers less likely"):
        check(likely(merged), likely(gptq))


def test_a_refused_likelihood_gives_both_figures_and_the_limit() -> None:
    with pytest.raises(TrainingError) as caught:
        check(likely(2.0), likely(2.5), max_gptq_nll=0.1)
    assert "nats a token merged" in caught.value.wrong
    assert "loss 0.500 [0.500, 0.500]" in caught.value.wrong
    assert caught.value.expected.startswith("at most 0.200 (evaluate.max_gptq_nll")
    assert caught.value.todo


def test_a_limit_of_the_recipe_holds() -> None:
    check(likely(2.0), likely(2.1), max_gptq_nll=0.1)


def test_noise_refuses_no_more_than_one_in_twenty() -> None:
    """The interval is of 95 %, and only one of its ends refuses."""
    refused = 0
    for seed in range(40):
        try:
            check(likely(2.0, spread=1.0, seed=seed), likely(2.0, spread=1.0, seed=1000 + seed))
        except TrainingError:
            refused += 1
    assert refused <= 2


def test_likelihood_is_undecided_when_examples_are_too_few() -> None:
    _, nll = judged(likely(2.0, total=7), likely(9.0, total=7))
    assert (nll.verdict.outcome, nll.verdict.examples_to_decide) == (GateOutcome.UNDECIDED, 8)


def first_answers(lost: int, gained: int, total: int) -> tuple[Qualified, Qualified]:
    """Formats that differ on the first answers alone: lost ones, then gained ones."""
    merged = [REFERENCE if not lost <= place < lost + gained else "no" for place in range(total)]
    gptq = [REFERENCE if place >= lost else "no" for place in range(total)]
    return qualified(merged, [1.0] * total), qualified(gptq, [1.0] * total)


@pytest.mark.parametrize(
    ("lost", "gained", "total", "wanted"),
    [
        (0, 0, 200, GateOutcome.PASSED),
        (2, 1, 200, GateOutcome.PASSED),
        (10, 4, 200, GateOutcome.UNDECIDED),  # three points of an ordinary first version
        (4, 0, 30, GateOutcome.UNDECIDED),  # 13 %
        (0, 0, 30, GateOutcome.UNDECIDED),
        (30, 0, 200, GateOutcome.FAILED),
    ],
)
def test_a_loss_within_the_limit_is_passed_only_when_the_examples_prove_it(
    lost: int, gained: int, total: int, wanted: GateOutcome
) -> None:
    loss, nll = judged(*first_answers(lost, gained, total))
    assert (loss.verdict.outcome, nll.verdict.outcome) == (wanted, GateOutcome.PASSED)


def test_an_ordinary_first_version_is_not_refused_and_the_warning_says_how_many_examples_would_decide(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(*first_answers(10, 4, 200))
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("GPTQ lost 0.030 of exact match: 0.980 [")
    assert told.endswith(
        "undecided: a loss of up to 0.068 cannot be excluded with 200 examples; about 1,600 would decide"
    )


def test_a_metric_of_the_whole_set_is_undecided_when_no_answer_changes_and_examples_are_few() -> None:
    loss, _ = judged(won(20, 30), won(20, 30), MacroF1())
    assert (loss.verdict.loss.value, loss.verdict.outcome) == (0, GateOutcome.UNDECIDED)


def test_a_gain_is_said_as_a_gain() -> None:
    loss, _ = judged(won(100, 200), won(120, 200))
    assert loss.verdict.outcome is GateOutcome.PASSED
    assert loss.measured.startswith("GPTQ gained 0.100 of exact match: 0.500 [")


def written(kept: float, metric: Metric, nll: float = 1.0, total: int = 40) -> Qualified:
    """A format whose every answer has that share of the reference's words, and never all of them."""
    words = REFERENCE.split()
    answers = [" ".join([*words[: round(kept * len(words))], f"other{place}"]) for place in range(total)]
    return qualified(answers, [nll] * total, metric=metric)


def test_a_broken_model_of_free_text_is_refused_where_exact_match_sees_nothing() -> None:
    metric = Rouge("L")
    merged, broken = written(0.8, metric), written(0.0, metric)
    assert merged.evaluation.exact_match.value == broken.evaluation.exact_match.value == 0.0
    with pytest.raises(TrainingError, match=r"GPTQ lost 0\.\d+ of ROUGE-L: 0\.\d+ \["):
        check(merged, broken, metric)


def test_a_model_of_free_text_that_writes_as_well_passes() -> None:
    metric = Rouge("L")
    check(written(0.8, metric), written(0.8, metric), metric)


def test_a_perplexity_may_rise_by_a_share_of_the_merged_models() -> None:
    metric, merged = Perplexity(), likely(2.0)
    check(merged, likely(2.04), metric, max_gptq_nll=1.0)
    with pytest.raises(TrainingError, match=r"GPTQ added .* to the perplexity") as caught:
        check(merged, likely(2.1), metric, max_gptq_nll=1.0)
    assert "times the merged model's" in caught.value.expected


def test_a_metric_without_scores_of_examples_gates_too() -> None:
    with pytest.raises(TrainingError, match="of macro-F1"):
        check(won(160, 200), won(100, 200), MacroF1())


class Points(Metric):
    """A metric of the user's, on a scale of its own."""

    name = "points"
    title = "points"
    better = Better.HIGHER
    unit = Unit.NUMBER

    def score(self, answered: Any) -> list[float]:
        return [100.0 * len(answer.split()) for answer in answered.answers]


def test_the_users_own_metric_may_lose_a_share_of_the_merged_models() -> None:
    metric = Points()
    check(written(0.8, metric), written(0.8, metric), metric)
    with pytest.raises(TrainingError, match=r"GPTQ lost 100\.000 of points: 900\.000") as caught:
        check(written(0.8, metric), written(0.7, metric), metric)
    assert caught.value.expected.startswith("at most 45.000")
