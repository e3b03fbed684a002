"""The benchmark of starts says how much longer ours takes, what that is made of, and how sure it is."""

import pytest

from benchmarks.start_time import Pair, Start, summary

PAIRS = [
    Pair(20.0, Start(before=1.0, engine=20.0, after=0.5)),
    Pair(30.0, Start(before=1.2, engine=29.0, after=0.3)),
    Pair(25.0, Start(before=0.8, engine=27.0, after=0.4)),
]


def test_a_start_is_the_sum_of_its_parts() -> None:
    assert PAIRS[0].served.total == 21.5


def test_figures_are_medians_of_the_measurements() -> None:
    found = summary(PAIRS)
    assert (found["bare"], found["served"]) == (25.0, 28.2)
    assert (found["before"], found["after"]) == (1.0, 0.4)


def test_differences_are_computed_within_pairs() -> None:
    found = summary(PAIRS)
    assert found["difference"] == pytest.approx(1.5)
    assert found["engine_over_bare"] == 0.0
