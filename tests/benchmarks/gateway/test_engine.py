"""Tests the throughput summary for a real engine."""

import pytest

from benchmarks.gateway.engine import Pair, summary


def test_throughput_ratio_is_computed_per_measurement_pair() -> None:
    result = summary([Pair(100.0, 99.0), Pair(50.0, 49.0), Pair(10.0, 10.0)])
    assert (result["direct"], result["served"]) == (50.0, 49.0)
    assert result["share"]["median"] == pytest.approx(0.99)
    assert result["share"]["low"] < 0.99 < result["share"]["high"]


def test_single_measurement_pair_has_no_confidence_interval() -> None:
    assert summary([Pair(100.0, 99.0)])["share"] == {"median": 0.99, "low": None, "high": None}
