"""Tests that a model's pace follows its recent answers."""

import pytest

from serving.engines.token_pace import TokenPace


def paced(*answers: tuple[float, float]) -> float:
    """Return the pace in tokens per second after these answers, given as (tokens, seconds)."""
    pace = TokenPace()
    for tokens, seconds in answers:
        pace.observe(tokens, seconds)
    return pace.tokens_in(1.0)


def test_token_pace_defaults_to_100_tokens_per_second_before_any_measurement() -> None:
    assert TokenPace().tokens_in(0.5) == 50


def test_token_pace_is_tokens_per_second_over_all_measured_answers() -> None:
    assert paced((200, 2.0)) == pytest.approx(100)
    assert paced((200, 2.0), (200, 4.0)) == pytest.approx(67, abs=3)


def test_many_slow_one_token_answers_hardly_change_the_token_pace() -> None:
    normal = [(100.0, 2.0)] * 20
    assert paced(*normal, *[(1.0, 60.0)] * 20) > 25
    assert paced(*normal, (1.0, 4.0)) == pytest.approx(50, abs=1)


def test_token_pace_changes_when_an_engine_becomes_slower() -> None:
    assert paced(*[(100.0, 1.0)] * 50, *[(100.0, 10.0)] * 50) == pytest.approx(10, abs=3)
