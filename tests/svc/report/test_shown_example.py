"""Which examples a person is shown."""

from svc.evaluation.metrics.metric import Better
from svc.report.judged import BASE, Judged
from svc.report.shown_example import lost_examples, side_by_side, worst_examples
from tests.svc.report.judged_versions import evaluation
from tests.svc.report.test_judged import LABELS, TEXTS, judged, right


def numbers(shown: tuple[object, ...]) -> list[int]:
    """Their lines."""
    return [one.number for one in shown]  # type: ignore[attr-defined]


def test_the_worst_have_the_lowest_score() -> None:
    answers = [one.answer for one in TEXTS]
    answers[4], answers[7] = "nothing of it", "a tool that does number"
    assert numbers(worst_examples(judged(TEXTS, {"merged": answers}), Better.HIGHER)) == [5, 8]


def test_of_equal_scores_the_least_likely_reference_is_the_worst() -> None:
    made = evaluation(LABELS, right(LABELS, 57), [1.0] * 58 + [3.0, 2.0])
    found = Judged(LABELS, {"merged": made.report}, {"merged": made.results})
    assert numbers(worst_examples(found, Better.HIGHER)) == [59, 60, 58]


def test_a_metric_that_is_better_when_lower_has_its_worst_at_the_top() -> None:
    found = judged(TEXTS, {"merged": ["x"] * len(TEXTS)})
    results = [
        one.model_copy(update={"scores": {"rouge_l": float(at)}}) for at, one in enumerate(found.results["merged"])
    ]
    worst = worst_examples(Judged(TEXTS, found.evaluations, {"merged": results}), Better.LOWER)
    assert numbers(worst)[:2] == [30, 29]


def test_a_shown_answer_is_marked_when_it_was_cut_off() -> None:
    found = judged(LABELS, {"merged": right(LABELS, 0)})
    results = [
        one.model_copy(update={"finish_reason": "length" if at == 2 else "stop"})
        for at, one in enumerate(found.results["merged"])
    ]
    worst = worst_examples(Judged(LABELS[:3], found.evaluations, {"merged": results[:3]}), Better.HIGHER)
    assert [one.answers[0].cut_off for one in sorted(worst, key=lambda one: one.number)] == [False, False, True]


def test_no_right_answer_is_among_the_worst() -> None:
    assert worst_examples(judged(LABELS, {"merged": right(LABELS, 60)}), Better.HIGHER) == ()


def test_lost_is_what_the_base_had_right() -> None:
    base, tuned = right(LABELS, 10), right(LABELS, 60)
    tuned[3] = tuned[6] = tuned[50] = "none of them"
    assert numbers(lost_examples(judged(LABELS, {BASE: base, "merged": tuned}), Better.HIGHER)) == [4, 7]


def test_without_the_answers_of_the_base_nothing_is_lost() -> None:
    found = judged(LABELS, {BASE: right(LABELS, 60), "merged": right(LABELS, 0)}, kept=["merged"])
    assert lost_examples(found, Better.HIGHER) == ()


def test_twenty_are_spread_over_all_whatever_was_answered() -> None:
    one, other = (judged(LABELS, {"merged": right(LABELS, count)}) for count in (0, 60))
    assert numbers(side_by_side(one)) == numbers(side_by_side(other)) == list(range(1, 61, 3))


def test_of_few_all_are_shown() -> None:
    assert numbers(side_by_side(judged(TEXTS[:7], {"merged": right(TEXTS[:7], 3)}))) == list(range(1, 8))


def test_an_example_has_the_answers_of_all_models() -> None:
    found = judged(LABELS, {BASE: right(LABELS, 0), "merged": right(LABELS, 60), "gptq": right(LABELS, 60)})
    [first, *_] = side_by_side(found)
    assert [(answer.model, answer.text) for answer in first.answers] == [
        (BASE, "none of them"),
        ("merged", "net"),
        ("gptq", "net"),
    ]
