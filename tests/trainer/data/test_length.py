"""Tests that too long examples are rejected, dropped or truncated, and rejected if they exceed the engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.errors import DataError
from trainer.data.length import check_served_length, fit_length
from trainer.recipe.train import TooLong, Train


def row(prompt: int, answer: int) -> TokenizedExample:
    return TokenizedExample(tuple(range(prompt + answer)), ((prompt, prompt + answer),))


SHORT = row(8, 4)


def train(too_long: TooLong) -> Train:
    return Train(max_length=16, too_long=too_long)


@pytest.mark.parametrize("policy", TooLong)
def test_examples_that_fit_the_maximum_length_are_unchanged(policy: TooLong) -> None:
    assert fit_length([[SHORT], [row(8, 8), SHORT]], train(policy)) == [[SHORT], [row(8, 8), SHORT]]


def test_overlong_examples_error_names_the_longest_example() -> None:
    with pytest.raises(
        DataError, match="2 of 3 examples are longer than 16 tokens; the longest, example 3, has 30 tokens"
    ):
        fit_length([[SHORT], [row(10, 7)], [SHORT, row(20, 10), SHORT]], train(TooLong.ERROR))


def test_examples_that_are_too_long_are_dropped_when_the_policy_is_drop(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit_length([[SHORT], [SHORT, row(10, 7)], [SHORT]], train(TooLong.DROP)) == [[SHORT], [SHORT]]
    assert "1 of 3 examples are longer than 16 tokens (first: example 2): 1 dropped, 0 truncated" in " ".join(
        capsys.readouterr().err.split()
    )


def test_truncate_policy_shortens_overlong_examples_and_drops_those_left_without_an_answer() -> None:
    remaining = fit_length([[SHORT, row(16, 1)], [row(10, 7)], [row(16, 1)]], train(TooLong.TRUNCATE))
    assert remaining == [[SHORT], [TokenizedExample(tuple(range(16)), ((10, 16),))]]


@pytest.mark.parametrize("policy", [TooLong.DROP, TooLong.TRUNCATE])
def test_dataset_is_rejected_if_only_one_example_fits_the_maximum_length(policy: TooLong) -> None:
    with pytest.raises(DataError, match="1 of 2 examples fit into 16 tokens"):
        fit_length([[SHORT], [row(30, 2)]], train(policy))


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=4), st.sampled_from(list(TooLong)[1:]))
def test_examples_that_remain_after_length_checks_fit_the_limit_and_have_an_answer_to_train_on(
    sizes: list[tuple[int, int]], policy: TooLong
) -> None:
    rows = [SHORT, SHORT, *(row(*size) for size in sizes)]
    for [remaining] in fit_length([[row] for row in rows], train(policy)):
        assert len(remaining.input_ids) <= 16
        assert remaining.scored > 0
        assert all(0 < start < end <= len(remaining.input_ids) for start, end in remaining.learnt)


def test_examples_that_fit_the_engine_context_are_accepted() -> None:
    check_served_length([SHORT, row(10, 5)], 16, "training")
    check_served_length([], 16, "training")


def test_example_that_leaves_no_room_for_one_more_token_in_the_engine_context_is_rejected() -> None:
    with pytest.raises(DataError, match="example 2, needs 17 including its answer"):
        check_served_length([SHORT, row(10, 6)], 16, "held-out")


def test_context_overflow_error_names_the_setting_to_change() -> None:
    with pytest.raises(
        DataError, match="1 of 2 held-out examples need more than 16 tokens; the longest, example 2"
    ) as caught:
        check_served_length([SHORT, row(10, 7)], 16, "held-out")
    assert "engine.max_model_len to at least 18" in caught.value.todo


def test_context_check_uses_the_maximum_answer_length_if_longer_than_the_reference() -> None:
    check_served_length([SHORT], 16, "held-out", room=8)
    with pytest.raises(DataError, match="needs 17"):
        check_served_length([SHORT], 16, "held-out", room=9)
