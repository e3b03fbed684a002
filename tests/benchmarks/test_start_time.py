"""Tests that the start benchmark reports the extra time, its parts and its interval."""

import pytest

from benchmarks.start_time import Pair, Start, summary

PAIRS = [
    Pair(20.0, Start(before=1.0, engine=20.0, after=0.5)),
    Pair(30.0, Start(before=1.2, engine=29.0, after=0.3)),
    Pair(25.0, Start(before=0.8, engine=27.0, after=0.4)),
]


def test_start_time_is_the_sum_of_its_phases() -> None:
    assert PAIRS[0].served.total == 21.5


def test_summary_of_startup_times_reports_medians() -> None:
    result = summary(PAIRS)
    assert (result["bare"], result["served"]) == (25.0, 28.2)
    assert (result["before"], result["after"]) == (1.0, 0.4)


def test_startup_time_differences_are_computed_per_measurement_pair() -> None:
    result = summary(PAIRS)
    assert result["difference"] == pytest.approx(1.5)
    assert result["engine_over_bare"] == 0.0
