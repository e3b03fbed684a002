"""Quantiles are accurate to 1%, and their limits hold at any time."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.rollout.analysis.comparisons import Times


@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=200), st.sampled_from([0.05, 0.5, 0.95, 1.0]))
def test_quantile_is_at_most_1_percent_above_the_exact_value(values: list[float], share: float) -> None:
    times = Times()
    for value in values:
        times.add(value)
    exact = sorted(values)[math.ceil(share * len(values)) - 1]
    assert exact * (1 - 1e-9) <= times.quantile(share) <= exact * 1.01 * (1 + 1e-9)


def test_quantile_raises_an_error_when_no_durations_were_recorded() -> None:
    with pytest.raises(ValueError, match="no times"):
        Times().quantile(0.95)


def test_upper_confidence_limit_of_a_quantile_is_unknown_with_few_samples() -> None:
    times = Times()
    assert times.limits(0.95, 0.05) == (0.0, None)
    times.add(0.3)
    assert times.limits(0.95, 0.05) == (0.0, None)


@pytest.mark.slow
def test_confidence_limits_contain_the_true_quantile_at_all_times() -> None:
    draw = np.random.default_rng(0)
    truth, missed = math.exp(0.5 * 1.645), 0
    for _ in range(50):
        times = Times()
        for count, value in enumerate(draw.lognormal(0, 0.5, 2000), 1):
            times.add(float(value))
            if count % 100 == 0:
                low, high = times.limits(0.95, 0.05)
                if not low <= truth <= (math.inf if high is None else high):
                    missed += 1
                    break
    assert missed / 50 <= 0.05
    assert high is not None
    assert high / low < 1.6


def test_durations_outside_the_supported_range_are_clipped() -> None:
    times = Times()
    for value in (0.0, 1e9):
        times.add(value)
    assert times.quantile(0.5) < 1e-3
    assert times.quantile(1.0) > 1e4
