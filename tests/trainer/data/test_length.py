"""Examples that are too long are rejected, dropped or cut; those that do not fit the engine are rejected first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.errors import DataError
from trainer.data.length import check_served_length, fit_length
from trainer.recipe.sections import TooLong, Train


def row(prompt: int, answer: int) -> TokenizedExample:
    return TokenizedExample(tuple(range(prompt + answer)), ((prompt, prompt + answer),))


SHORT = row(8, 4)


def train(too_long: TooLong) -> Train:
    return Train(max_length=16, too_long=too_long)


@pytest.mark.parametrize("policy", TooLong)
def test_examples_that_fit_are_trained_on_as_they_are(policy: TooLong) -> None:
    assert fit_length([SHORT, row(8, 8)], train(policy)) == [SHORT, row(8, 8)]


def test_error_names_the_longest_example_when_examples_are_too_long() -> None:
    with pytest.raises(DataError, match="2 of 3 examples are longer than 16 tokens; the longest, number 3, has 30"):
        fit_length([SHORT, row(10, 7), row(20, 10)], train(TooLong.ERROR))


def test_longer_examples_are_dropped_when_too_long_is_drop(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit_length([SHORT, row(10, 7), SHORT], train(TooLong.DROP)) == [SHORT, SHORT]
    assert "1 of 3 examples are longer than 16 tokens, the first is number 2: 1 were dropped, 0 cut" in " ".join(
        capsys.readouterr().err.split()
    )


def test_longer_examples_are_cut_and_dropped_when_no_answer_is_left() -> None:
    found = fit_length([SHORT, row(10, 7), row(16, 1)], train(TooLong.TRUNCATE))
    assert found == [SHORT, TokenizedExample(tuple(range(16)), ((10, 16),))]


@pytest.mark.parametrize("policy", [TooLong.DROP, TooLong.TRUNCATE])
def test_data_is_rejected_when_one_example_fits(policy: TooLong) -> None:
    with pytest.raises(DataError, match="1 of 2 examples fit into 16 tokens"):
        fit_length([SHORT, row(30, 2)], train(policy))


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=4), st.sampled_from(list(TooLong)[1:]))
def test_remaining_examples_fit_and_have_an_answer_to_learn(sizes: list[tuple[int, int]], policy: TooLong) -> None:
    rows = [SHORT, SHORT, *(row(*size) for size in sizes)]
    for kept in fit_length(rows, train(policy)):
        assert len(kept.input_ids) <= 16
        assert kept.scored > 0
        assert all(0 < start < end <= len(kept.input_ids) for start, end in kept.learnt)


def test_examples_pass_when_they_fit_into_the_engine() -> None:
    check_served_length([SHORT, row(10, 5)], 16, "training")
    check_served_length([], 16, "training")


def test_an_example_that_fills_the_context_is_refused_because_scoring_needs_one_more_token() -> None:
    with pytest.raises(DataError, match="number 2, needs 17 with its answer"):
        check_served_length([SHORT, row(10, 6)], 16, "held-out")


def test_error_names_the_setting_when_an_example_exceeds_the_engines_context() -> None:
    with pytest.raises(
        DataError, match="1 of 2 held-out examples need more than 16 tokens; the longest, number 2"
    ) as it:
        check_served_length([SHORT, row(10, 7)], 16, "held-out")
    assert "engine.max_model_len to 18" in it.value.todo


def test_the_longest_answer_that_is_asked_for_counts_after_the_prompt() -> None:
    check_served_length([SHORT], 16, "held-out", room=8)
    with pytest.raises(DataError, match="needs 17"):
        check_served_length([SHORT], 16, "held-out", room=9)
