"""Tests the comparison of a version with its base."""

import pytest

from svc.evaluation.comparison import Direction
from svc.evaluation.metrics.metric import Answered
from tests.builders.judged_versions import LABELS, TEXTS, evaluation, judged, right
from trainer.report.judged import BASE, Judged


@pytest.mark.parametrize(
    ("base", "merged", "outcome"),
    [(10, 50, Direction.BETTER), (50, 10, Direction.WORSE), (30, 31, Direction.UNDECIDED)],
)
def test_report_verdict_is_better_or_worse_for_a_large_change_and_undecided_for_a_small_one(
    base: int, merged: int, outcome: Direction
) -> None:
    comparison = judged(LABELS, {BASE: right(LABELS, base), "merged": right(LABELS, merged)})
    [verdict] = comparison.verdicts
    assert (verdict.model, verdict.other, verdict.outcome) == ("merged", BASE, outcome)
    assert verdict.change is not None
    assert verdict.change.value == pytest.approx((merged - base) / 60)


def test_report_compares_gptq_with_both_the_base_model_and_the_merged_format() -> None:
    comparison = judged(LABELS, {BASE: right(LABELS, 5), "merged": right(LABELS, 50), "gptq": right(LABELS, 49)})
    pairs = [(verdict.model, verdict.other) for verdict in comparison.verdicts]
    assert pairs == [("merged", BASE), ("gptq", BASE), ("gptq", "merged")]


def test_primary_metric_determines_the_report_verdict_and_comes_first() -> None:
    comparison = judged(TEXTS, {BASE: right(TEXTS, 0), "merged": right(TEXTS, 20)})
    assert comparison.rows[0].name == "rouge_l"
    assert comparison.rows[-1].name == "nll"


def test_report_shows_the_paired_change_of_every_metric() -> None:
    comparison = judged(LABELS, {BASE: right(LABELS, 10), "merged": right(LABELS, 40)})
    changes = {row.name: row.changes["merged"].value for row in comparison.rows}
    assert set(changes) == {"accuracy", "macro_f1", "exact_match", "perplexity", "length", "cut_off", "nll"}
    for row in comparison.rows:
        difference = row.estimates["merged"].value - row.estimates[BASE].value
        assert changes[row.name] == pytest.approx(difference, abs=1e-9)


@pytest.mark.parametrize(("base", "outcome"), [(0, Direction.BETTER), (20, Direction.UNDECIDED)])
def test_report_verdict_without_paired_answers_is_undecided_if_the_confidence_intervals_overlap(
    base: int, outcome: Direction
) -> None:
    comparison = judged(LABELS, {BASE: right(LABELS, base), "merged": right(LABELS, 24)}, kept=["merged"])
    [verdict] = comparison.verdicts
    assert (verdict.outcome, verdict.change) == (outcome, None)


def test_report_judges_the_gptq_format_if_there_is_no_merged_format() -> None:
    assert judged(LABELS, {"gptq": right(LABELS, 10)}).tuned == "gptq"


def test_report_gives_no_verdicts_for_an_unevaluated_version() -> None:
    comparison = Judged([], {}, {})
    assert (comparison.tuned, comparison.rows, comparison.verdicts) == (None, (), ())


def test_lower_value_counts_as_better_when_the_metric_says_so() -> None:
    made = {
        BASE: evaluation(LABELS, right(LABELS, 9), [3.0] * 60),
        "merged": evaluation(LABELS, right(LABELS, 9), [1.0] * 60),
    }
    reports = {model: one.report.model_copy(update={"primary": "perplexity"}) for model, one in made.items()}
    [verdict] = Judged(LABELS, reports, {model: one.results for model, one in made.items()}).verdicts
    assert verdict.outcome is Direction.BETTER


def test_macro_f1_change_equals_the_difference_computed_by_the_metric() -> None:
    from svc.evaluation.metrics.labels import MacroF1

    comparison = judged(LABELS, {BASE: right(LABELS, 10), "merged": right(LABELS, 40)})
    before, after = (Answered(LABELS, comparison.results[model]) for model in (BASE, "merged"))
    assert comparison.change("macro_f1", BASE, "merged") == MacroF1().difference(before, after)
