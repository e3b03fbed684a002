"""Bets on ratings: only worse ones win."""

import pytest

from monitoring.drift.bets import hit_table, upper_limit
from monitoring.drift.evidence import HIT
from monitoring.drift.signals import rating_bets, rating_sample


def test_the_features_of_ratings_are_bad_and_corrected() -> None:
    sample = rating_sample([(True, True), (True, False), (False, False)])
    table = hit_table(rating_bets(sample), sample)
    assert (table == HIT).tolist() == [[True, True], [True, False], [False, False]]


def test_rating_bounds_are_upper_confidence_limits_of_the_reference_shares() -> None:
    bets = rating_bets(rating_sample([(place < 6, place < 2) for place in range(100)]))
    assert [(bet.feature, bet.bound) for bet in bets] == [
        ("bad_ratings", upper_limit(6, 100, 2.0)),
        ("corrections", upper_limit(2, 100, 2.0)),
    ]


def test_the_bound_is_1_when_all_ratings_of_the_reference_are_bad() -> None:
    assert rating_bets(rating_sample([(True, True)] * 100))[0].bound == pytest.approx(1)


def test_a_sample_without_ratings_has_categories_of_text() -> None:
    sample = rating_sample([])
    assert sample.size == 0
    assert all(values.dtype.kind == "U" for values in sample.categories.values())
    assert hit_table(rating_bets(rating_sample([(False, False)])), sample).shape == (0, 2)
