"""Tests that the reference sample is drawn like traffic and separately from the text space."""

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from svc.drift_reference.drift_sample import MAX_SAMPLED, draw_drift_sample
from tests.svc.chats import chat


@given(st.lists(st.integers(0, 30), min_size=2, max_size=80), st.integers(0, 2**40))
def test_drift_sample_and_remainder_partition_the_examples(numbers: list[int], seed: int) -> None:
    examples = [chat(f"question {number}") for number in numbers]
    drawn = draw_drift_sample(examples, seed)
    assert Counter([*drawn.sample, *drawn.rest]) == Counter(examples)
    assert drawn.sample and drawn.rest


def test_drift_sample_contains_half_of_the_examples() -> None:
    assert len(draw_drift_sample([chat(str(number)) for number in range(400)], 0).sample) == 200


def test_drift_sample_size_is_capped_for_many_examples() -> None:
    assert len(draw_drift_sample([chat(str(number)) for number in range(3000)], 0).sample) == MAX_SAMPLED


def test_frequent_question_is_sampled_in_proportion_to_its_frequency() -> None:
    """The question is on 800 of 2,000 lines, and the result must be within four standard deviations."""
    examples = [chat("How are you?")] * 800 + [chat(str(number)) for number in range(1200)]
    shares = [
        sum(example == examples[0] for example in draw_drift_sample(examples, seed).sample) / MAX_SAMPLED
        for seed in range(5)
    ]
    assert all(0.32 < share < 0.48 for share in shares)


def test_adjacent_duplicates_in_the_file_are_spread_out_in_the_drift_sample() -> None:
    examples = [chat(str(number // 10)) for number in range(400)]
    sample = draw_drift_sample(examples, 0).sample
    assert sum(one == other for one, other in pairwise(sample)) < 10


def test_drift_sample_is_determined_by_the_seed() -> None:
    examples = [chat(str(number)) for number in range(40)]
    assert draw_drift_sample(examples, 0) == draw_drift_sample(examples, 0)
    assert draw_drift_sample(examples, 0).sample != draw_drift_sample(examples, 1).sample
