"""The rate of a real engine: the share of it that comes through is that within pairs."""

import pytest

from benchmarks.gateway.engine import Pair, summary


def test_the_ratio_is_computed_within_pairs() -> None:
    found = summary([Pair(100.0, 99.0), Pair(50.0, 49.0), Pair(10.0, 10.0)])
    assert (found["direct"], found["served"]) == (50.0, 49.0)
    assert found["share"]["median"] == pytest.approx(0.99)
    assert found["share"]["low"] < 0.99 < found["share"]["high"]


def test_there_is_no_interval_when_there_is_one_pair() -> None:
    assert summary([Pair(100.0, 99.0)])["share"] == {"median": 0.99, "low": None, "high": None}
