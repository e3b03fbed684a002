"""Tests the confidence interval of a few measurements."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.interval import interval


def test_confidence_interval_uses_students_t() -> None:
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((-0.4841, 4.4841), abs=1e-4)


def test_confidence_interval_is_infinite_for_one_value() -> None:
    assert interval([1.0]) == (-math.inf, math.inf)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_mean_lies_within_its_confidence_interval(differences: list[float]) -> None:
    low, high = interval(differences)
    assert low <= math.fsum(differences) / len(differences) + 1e-9
    assert high >= math.fsum(differences) / len(differences) - 1e-9
