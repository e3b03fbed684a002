"""Tests that evaluation results have intervals with the stated coverage."""

import math
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svc.evaluation.intervals import Interval, bootstrap, mean, paired_difference, proportion

counts = st.integers(1, 10_000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))
values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


@given(counts)
def test_proportion_lies_within_its_interval_and_the_interval_lies_between_0_and_1(count: tuple[int, int]) -> None:
    estimate = proportion(*count)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.low < estimate.high


@given(counts)
def test_intervals_of_hit_and_miss_proportions_mirror_each_other(count: tuple[int, int]) -> None:
    hits, total = count
    one, other = proportion(hits, total), proportion(total - hits, total)
    assert math.isclose(one.low, 1 - other.high, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_confidence_intervals_match_published_values(hits: int, total: int, low: float, high: float) -> None:
    estimate = proportion(hits, total)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (low, high)


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (-1, 5), (6, 5), (1, -1)])
def test_proportion_with_invalid_counts_raises_value_error(hits: int, total: int) -> None:
    with pytest.raises(ValueError, match="hits of"):
        proportion(hits, total)


@pytest.mark.slow
@settings(max_examples=20)
@given(values, st.data())
def test_weighted_mean_equals_mean_of_repeated_values(numbers: list[float], data: st.DataObject) -> None:
    weights = [data.draw(st.integers(1, 4)) for _ in numbers]
    repeated = [value for value, weight in zip(numbers, weights, strict=True) for _ in range(weight)]
    assert math.isclose(mean(numbers, weights).value, mean(repeated).value, abs_tol=1e-6)


@settings(max_examples=20)
@given(values)
def test_weighting_all_values_equally_does_not_change_the_mean_or_its_confidence_interval(numbers: list[float]) -> None:
    weighted, plain = mean(numbers, [3.0] * len(numbers)), mean(numbers)
    for one, other in ((weighted.value, plain.value), (weighted.low, plain.low), (weighted.high, plain.high)):
        assert math.isclose(one, other, rel_tol=1e-12, abs_tol=1e-6)


@settings(max_examples=20)  # each draws 2000 samples
@given(values)
def test_mean_and_its_interval_lie_between_the_smallest_and_largest_value(numbers: list[float]) -> None:
    estimate = mean(numbers)
    slack = 1e-6
    assert min(numbers) - slack <= estimate.low <= estimate.high <= max(numbers) + slack
    assert min(numbers) - slack <= estimate.value <= max(numbers) + slack


def test_confidence_interval_of_the_mean_is_close_to_the_normal_approximation() -> None:
    generator = random.Random(1)
    numbers = [generator.gauss(10, 2) for _ in range(400)]
    estimate = mean(numbers)
    assert estimate.low == pytest.approx(estimate.value - 1.96 * 2 / 20, abs=0.05)
    assert estimate.high == pytest.approx(estimate.value + 1.96 * 2 / 20, abs=0.05)


def test_mean_and_interval_are_reproducible_for_equal_input() -> None:
    assert mean([1.0, 2.0, 5.0]) == mean([1.0, 2.0, 5.0])


def test_mean_of_no_values_is_rejected() -> None:
    with pytest.raises(ValueError, match="no examples"):
        mean([])


def test_paired_difference_has_a_zero_width_interval_when_all_examples_differ_by_the_same_amount() -> None:
    first = [float(number) for number in range(50)]
    difference = paired_difference(first, [value + 0.5 for value in first])
    assert difference == Interval(value=0.5, low=0.5, high=0.5)


def test_paired_difference_of_unequal_lengths_is_rejected() -> None:
    with pytest.raises(ValueError, match="argument"):
        paired_difference([1.0], [1.0, 2.0])


def test_estimate_is_printed_with_its_confidence_interval() -> None:
    assert str(Interval(value=0.5, low=0.25, high=0.75)) == "0.500 [0.250, 0.750]"


def test_general_bootstrap_function_and_mean_function_give_the_same_interval_for_a_mean() -> None:
    numbers = [1.0, 2.0, 5.0, 9.0]
    assert bootstrap(4, lambda drawn: drawn @ np.array(numbers) / drawn.sum(axis=1)) == mean(numbers)


def test_confidence_interval_of_the_mean_of_1000_values_is_computed_quickly() -> None:
    mean([0.0] * 10)  # numpy is imported
    numbers = [random.Random(1).random() for _ in range(1000)]
    started = time.process_time()
    mean(numbers)
    assert time.process_time() - started < 0.2


def test_bootstrap_interval_is_correct_when_resampling_in_batches() -> None:
    generator = random.Random(1)
    estimate = mean([generator.gauss(0, 1) for _ in range(3000)])
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 / math.sqrt(3000), rel=0.1)
