"""Figures a second, from two looks."""

from monitoring.status.figures import Figures, VersionFigures
from monitoring.status.rates import Rate, Rates


def figures(**requests: int) -> Figures:
    versions = {name: VersionFigures(name, requests=count, tokens_out=10 * count) for name, count in requests.items()}
    return Figures(versions, {})


def test_the_first_look_has_no_rates() -> None:
    assert Rates().between(figures(a=5), 100.0) == {}


def test_what_came_since_the_last_look_is_shared_out_over_the_time() -> None:
    rates = Rates()
    rates.between(figures(a=5), 100.0)
    rates.between(figures(a=6), 101.0)
    assert rates.between(figures(a=10), 103.0) == {"a": Rate(2.0, 20.0)}


def test_a_new_version_begins_at_zero() -> None:
    rates = Rates()
    rates.between(figures(a=5), 100.0)
    assert rates.between(figures(a=5, b=4), 102.0) == {"a": Rate(0.0, 0.0), "b": Rate(2.0, 20.0)}


def test_a_server_that_was_restarted_has_no_rate_at_once() -> None:
    rates = Rates()
    rates.between(figures(a=500), 100.0)
    assert rates.between(figures(a=5), 102.0) == {}
