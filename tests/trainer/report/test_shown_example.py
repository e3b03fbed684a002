"""Tests which examples are selected for display."""

from svc.evaluation.metrics.metric import Better
from tests.builders.judged_versions import LABELS, TEXTS, evaluation, judged, right
from trainer.report.judged import BASE, Judged


def test_worst_answers_have_the_lowest_scores() -> None:
    answers = [one.answer for one in TEXTS]
    answers[4], answers[7] = "nothing of it", "a tool that does number"
    assert judged(TEXTS, {"merged": answers}).worst == (5, 8)


def test_among_equally_scored_wrong_answers_the_one_with_the_least_likely_reference_is_worst() -> None:
    made = evaluation(LABELS, right(LABELS, 57), [1.0] * 58 + [3.0, 2.0])
    comparison = Judged(LABELS, {"merged": made.report}, {"merged": made.results})
    assert comparison.worst == (59, 60, 58)


def test_worst_answers_have_the_highest_scores_when_lower_is_better() -> None:
    comparison = judged(TEXTS, {"merged": ["x"] * len(TEXTS)})
    results = [
        one.model_copy(update={"scores": {"rouge_l": float(at)}}) for at, one in enumerate(comparison.results["merged"])
    ]
    report = comparison.evaluations["merged"]
    lower = report.metrics["rouge_l"].model_copy(update={"better": Better.LOWER})
    report = report.model_copy(update={"metrics": report.metrics | {"rouge_l": lower}})
    assert Judged(TEXTS, {"merged": report}, {"merged": results}).worst[:2] == (30, 29)


def test_correct_answers_are_never_among_the_worst() -> None:
    assert judged(LABELS, {"merged": right(LABELS, 60)}).worst == ()


def test_answer_is_reported_as_lost_if_only_the_base_model_was_correct() -> None:
    base, tuned = right(LABELS, 10), right(LABELS, 60)
    tuned[3] = tuned[6] = tuned[50] = "none of them"
    assert judged(LABELS, {BASE: base, "merged": tuned}).lost == (4, 7)


def test_no_answer_is_reported_as_lost_through_fine_tuning_if_base_answers_are_unavailable() -> None:
    comparison = judged(LABELS, {BASE: right(LABELS, 60), "merged": right(LABELS, 0)}, kept=["merged"])
    assert comparison.lost == ()


def test_twenty_shown_examples_are_evenly_spaced_regardless_of_answers() -> None:
    one, other = (judged(LABELS, {"merged": right(LABELS, count)}) for count in (0, 60))
    assert one.side_by_side == other.side_by_side == tuple(range(1, 61, 3))


def test_all_examples_are_shown_when_there_are_few() -> None:
    assert judged(TEXTS[:7], {"merged": right(TEXTS[:7], 3)}).side_by_side == tuple(range(1, 8))
