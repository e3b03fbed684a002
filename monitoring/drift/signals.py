"""Features of ratings of answers, and the bets on them."""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from monitoring.drift.bets import Bet, upper_limit
from monitoring.drift.evidence import HIT, MISS, Hits
from svc.drift_reference.sample import NO, YES, Sample

_SURE = 2.0
"""Standard errors: shares up to the upper limit of the 95 % Wilson interval are normal. Unlike topics, ratings do not
change with the hour."""


class RatingFeature(StrEnum):
    """The features of ratings; each is a line in the drift table."""

    BAD = "bad_ratings"
    CORRECTED = "corrections"


def rating_sample(pairs: Sequence[tuple[bool, bool]]) -> Sample:
    """Return ratings as a sample.

    Args:
        pairs: whether a rating is bad, and whether it has a correction.
    """
    columns = {RatingFeature.BAD: [bad for bad, _ in pairs], RatingFeature.CORRECTED: [fixed for _, fixed in pairs]}
    categories = {
        name.value: np.array([YES if value else NO for value in values], dtype=np.str_)
        for name, values in columns.items()
    }
    return Sample(len(pairs), {}, categories)


def rating_bets(reference: Sample) -> list[Bet]:
    """Return a bet on more bad ratings, and one on more corrections. Improvements raise no alarm."""
    return [
        Bet(name.value, upper_limit(int((reference.categories[name.value] == YES).sum()), reference.size, _SURE), hits)
        for name, hits in ((RatingFeature.BAD, _bad), (RatingFeature.CORRECTED, _corrected))
    ]


def _bad(ratings: Sample) -> Hits:
    return _hits(ratings, RatingFeature.BAD)


def _corrected(ratings: Sample) -> Hits:
    return _hits(ratings, RatingFeature.CORRECTED)


def _hits(ratings: Sample, feature: RatingFeature) -> Hits:
    return np.where(ratings.categories[feature.value] == YES, HIT, MISS).astype(np.int8)
