"""Tests comparing a second model with a first: properties for any answers, and results for clear cases."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svc.dataset.schema.example import ChatExample
from svc.errors import DataError
from svc.evaluation.comparison import SHOWN, Direction, VersionComparison, compare
from svc.evaluation.intervals import proportion
from svc.evaluation.metrics.choose import MetricOptions, choose_metrics
from svc.evaluation.metrics.labels import Accuracy, MacroF1
from svc.evaluation.metrics.metric import Answered
from svc.evaluation.metrics.text import ExactMatch, Rouge
from svc.evaluation.metrics.tokens import Length, Perplexity
from svc.evaluation.results import ExampleResult
from tests.svc.chats import chat

ALL = [Rouge("L"), ExactMatch(), Accuracy(), MacroF1(), Perplexity(), Length()]
MIRRORED = {
    Direction.BETTER: Direction.WORSE,
    Direction.WORSE: Direction.BETTER,
    Direction.UNDECIDED: Direction.UNDECIDED,
    Direction.DIFFERENT: Direction.DIFFERENT,
}
answers = st.sampled_from(["net", "mail", "the net", "none of these", ""])
rows = st.lists(
    st.tuples(st.sampled_from(["net", "mail"]), answers, answers, st.floats(0, 5), st.floats(0, 5)),
    min_size=1,
    max_size=12,
)


def result(answer: str, reference: str, nll: float = 1.0, end: str = "stop") -> ExampleResult:
    hit, tokens = answer == reference, len(answer) + 1
    return ExampleResult(
        answer=answer, tokens=tokens, limit=64, finish_reason=end, logprob=None, nll=nll, scored=1, hit=hit
    )


def pairs(given: Sequence[tuple[str, str, str, float, float]]) -> tuple[list[ChatExample], Answered, Answered]:
    examples = [chat(f"q {place}", reference) for place, (reference, *_) in enumerate(given)]
    first = [result(answer, reference, nll) for reference, answer, _, nll, _ in given]
    second = [result(answer, reference, nll) for reference, _, answer, _, nll in given]
    return examples, Answered(examples, first), Answered(examples, second)


def against(
    first: Sequence[str], second: Sequence[str], reference: str = "net", **options: object
) -> VersionComparison:
    """Compare two models by exact match when they find all references equally likely."""
    examples, one, other = pairs([(reference, a, b, 1.0, 1.0) for a, b in zip(first, second, strict=True)])
    return compare(examples, one.results, other.results, [ExactMatch(), Perplexity()], **options)  # type: ignore[arg-type]


@pytest.mark.slow
@settings(max_examples=30)
@given(rows)
def test_swapping_the_compared_models_reverses_the_sign_of_all_differences(
    given: list[tuple[str, str, str, float, float]],
) -> None:
    examples, one, other = pairs(given)
    there = compare(examples, one.results, other.results, ALL)
    back = compare(examples, other.results, one.results, ALL)
    for name, found in there.metrics.items():
        mirrored = back.metrics[name]
        assert (found.first, found.second) == (mirrored.second, mirrored.first)
        assert math.isclose(found.difference.value, -mirrored.difference.value, abs_tol=1e-12)
        assert math.isclose(found.difference.low, -mirrored.difference.high, abs_tol=1e-12)
        assert mirrored.direction is MIRRORED[found.direction]
    assert (there.tally.wins, there.tally.losses) == (back.tally.losses, back.tally.wins)
    assert there.tally.p_value == back.tally.p_value
    assert [one.place for one in there.different] == [one.place for one in back.different]


@pytest.mark.slow
@settings(max_examples=20)
@given(rows)
def test_model_compared_with_itself_has_no_differences(given: list[tuple[str, str, str, float, float]]) -> None:
    examples, one, _ = pairs(given)
    comparison = compare(examples, one.results, one.results, ALL)
    for compared in comparison.metrics.values():
        assert (compared.difference.low, compared.difference.value, compared.difference.high) == (0, 0, 0)
        assert compared.direction is Direction.UNDECIDED
    assert (comparison.tally.wins, comparison.tally.losses, comparison.tally.ties) == (0, 0, len(examples))
    assert comparison.tally.p_value == 1
    assert comparison.different == ()


@pytest.mark.parametrize(
    ("first", "second", "direction"),
    [
        (["mail"] * 20, ["net"] * 15 + ["mail"] * 5, Direction.BETTER),
        (["net"] * 20, ["net"] * 5 + ["mail"] * 15, Direction.WORSE),
        (["net", "mail"] * 10, ["mail", "net"] * 10, Direction.UNDECIDED),
    ],
)
def test_outcome_of_a_comparison_is_determined_by_the_primary_metric(
    first: list[str], second: list[str], direction: Direction
) -> None:
    assert against(first, second).direction is direction


@pytest.mark.parametrize(("differing", "direction"), [(5, Direction.UNDECIDED), (6, Direction.BETTER)])
def test_difference_that_chance_could_explain_at_the_5_percent_level_is_not_significant(
    differing: int, direction: Direction
) -> None:
    first = ["mail"] * differing + ["net"] * 20
    comparison = against(first, ["net"] * len(first))
    assert comparison.metrics["exact_match"].difference.low > 0
    assert comparison.direction is direction
    assert (comparison.tally.p_value < 0.05) is (direction is Direction.BETTER)


def test_lower_nll_counts_as_better() -> None:
    examples, one, other = pairs([("net", "net", "net", 2.0 + place / 10, 1.0) for place in range(10)])
    comparison = compare(examples, one.results, other.results, [ExactMatch(), Perplexity()])
    assert comparison.metrics["nll"].direction is Direction.BETTER
    assert comparison.metrics["perplexity"].direction is Direction.BETTER
    assert comparison.direction is Direction.UNDECIDED


def test_longer_answer_counts_as_different_but_not_better() -> None:
    examples, one, other = pairs([("net", "net", "net" + "t" * (place + 1), 1.0, 1.0) for place in range(10)])
    comparison = compare(examples, one.results, other.results, [ExactMatch(), Length()])
    assert comparison.metrics["length"].direction is Direction.DIFFERENT


def test_wins_and_losses_are_compared_with_the_exact_sign_test() -> None:
    first = ["mail"] * 8 + ["net"] * 2 + ["net"] * 10
    second = ["net"] * 8 + ["mail"] * 2 + ["net"] * 10
    tally = against(first, second).tally
    assert (tally.metric, tally.wins, tally.losses, tally.ties) == ("exact_match", 8, 2, 10)
    assert tally.p_value == pytest.approx(0.109375)  # 2 * (1 + 10 + 45) / 1024


def test_wins_on_a_corpus_metric_are_counted_with_the_corresponding_per_example_metric() -> None:
    examples, one, other = pairs([("net", "mail", '{"s": "net"}', 1.0, 1.0)] * 3 + [("mail", "x", "y", 1.0, 1.0)])
    with_it = compare(examples, one.results, other.results, [MacroF1(), Accuracy()])
    without = compare(examples, one.results, other.results, [MacroF1()])
    assert (with_it.primary, with_it.tally.metric, with_it.tally.wins) == ("macro_f1", "accuracy", 3)
    assert (without.tally.metric, without.tally.wins) == ("exact_match", 0)


def test_differing_examples_are_sorted_by_score_difference_and_then_by_edit_distance() -> None:
    first = ["net", "net", "no", "mail", "net"]
    second = ["a long other answer", "mail", "no, and more", "mail", "net"]
    differing = against(first, second).different
    assert [one.place for one in differing] == [0, 1, 2]
    assert [one.gain for one in differing] == [-1, -1, 0]
    assert differing[2].edits == len(", and more")
    assert (differing[1].asked, differing[1].reference, differing[1].first, differing[1].second) == (
        "q 1",
        "net",
        "net",
        "mail",
    )


def test_number_of_examples_shown_is_limited() -> None:
    assert len(against(["net"] * 50, ["mail"] * 50).different) == SHOWN


def test_token_based_metrics_are_excluded_when_the_models_have_different_tokenizers() -> None:
    comparison = against(["net"], ["mail"], no_tokens="the two have different tokenizers")
    assert set(comparison.metrics) == {"exact_match", "cut_off"}
    assert comparison.left_out == dict.fromkeys(("perplexity", "nll"), "the two have different tokenizers")


def test_model_with_significantly_fewer_truncated_answers_counts_as_better() -> None:
    examples = [chat(f"q {place}", "net") for place in range(20)]
    cut = [result("net", "net", end="length" if place < 15 else "stop") for place in range(20)]
    whole = [result("net", "net")] * 20
    truncation = compare(examples, cut, whole, [ExactMatch()]).metrics["cut_off"]
    assert (truncation.first, truncation.second) == (proportion(15, 20), proportion(0, 20))
    assert (truncation.difference.value, truncation.direction) == (-0.75, Direction.BETTER)


def test_next_usable_metric_becomes_primary_when_the_primary_metric_is_excluded() -> None:
    examples, one, other = pairs([("net", "net", "mail", 1.0, 1.0)])
    metrics = choose_metrics(examples, MetricOptions(names=("perplexity", "length", "exact_match")))
    comparison = compare(examples, one.results, other.results, metrics, no_tokens="elsewhere")
    assert comparison.primary == "exact_match"


def test_comparison_without_a_usable_metric_raises_error() -> None:
    examples, one, other = pairs([("net", "net", "mail", 1.0, 1.0)])
    with pytest.raises(DataError, match="none of the metrics can compare these models: elsewhere"):
        compare(examples, one.results, other.results, [Perplexity(), Length()], no_tokens="elsewhere")
