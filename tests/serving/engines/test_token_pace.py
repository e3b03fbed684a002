"""The pace of an engine follows the answers that ended lately."""

import pytest

from serving.engines.token_pace import TokenPace


def test_the_most_is_estimated_when_nothing_was_measured() -> None:
    assert TokenPace().estimate(0.5, 300) == 300


def test_an_estimate_follows_the_measured_pace_up_to_the_most() -> None:
    pace = TokenPace()
    pace.observe(200, 2.0)
    assert (pace.estimate(0.5, 300), pace.estimate(60.0, 300)) == (50, 300)


def test_an_estimate_is_at_least_one_token() -> None:
    pace = TokenPace()
    pace.observe(1, 1000.0)
    assert pace.estimate(0.001, 300) == 1


def test_long_answers_count_for_more_than_short_ones() -> None:
    pace = TokenPace()
    pace.observe(1, 1.0)
    pace.observe(10_000, 100.0)
    assert pace.estimate(1.0, 1000) > 95


def test_the_pace_is_a_new_one_after_an_engine_became_slower() -> None:
    pace = TokenPace()
    for tokens in [100] * 50 + [10] * 50:
        pace.observe(tokens, 1.0)
    assert pace.estimate(1.0, 1000) == pytest.approx(10, abs=8)
