"""The pace of a model follows the tokens that were generated lately."""

import pytest

from serving.replicas.token_pace import TokenPace


def paced(*answers: tuple[float, float]) -> float:
    """Return the tokens in a second after these answers: tokens, and seconds."""
    pace = TokenPace()
    for tokens, seconds in answers:
        pace.observe(tokens, seconds)
    return pace.tokens_in(1.0)


def test_a_fast_stream_is_assumed_when_nothing_was_measured() -> None:
    assert TokenPace().tokens_in(0.5) == 50


def test_the_pace_is_that_of_the_answers_that_were_measured() -> None:
    assert paced((200, 2.0)) == pytest.approx(100)
    assert paced((200, 2.0), (200, 4.0)) == pytest.approx(67, abs=3)


def test_answers_of_one_token_hardly_change_the_pace_however_many_and_slow_they_are() -> None:
    normal = [(100.0, 2.0)] * 20
    assert paced(*normal, *[(1.0, 60.0)] * 20) > 25
    assert paced(*normal, (1.0, 4.0)) == pytest.approx(50, abs=1)


def test_the_pace_is_a_new_one_when_an_engine_became_slower() -> None:
    assert paced(*[(100.0, 1.0)] * 50, *[(100.0, 10.0)] * 50) == pytest.approx(10, abs=3)
