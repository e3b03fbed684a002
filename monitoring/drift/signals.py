"""What people say of answers, as features to bet on."""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from monitoring.drift.bets import Bet, upper_share
from monitoring.drift.evidence import HIT, MISS, Hits
from svc.drift_reference.sample import NO, YES, Sample

_SURE = 2.0
"""Standard errors: what is normal of a share of ratings is the upper end of its 95 % Wilson interval. Unlike topics,
it does not change with the hour."""


class RatingFeature(StrEnum):
    """Each is a line of the drift table."""

    BAD = "bad_ratings"
    CORRECTED = "corrections"


def rating_sample(pairs: Sequence[tuple[bool, bool]]) -> Sample:
    """Return ratings as a sample.

    Args:
        pairs: whether it is bad, and whether it has a correction.
    """
    columns = {RatingFeature.BAD: [bad for bad, _ in pairs], RatingFeature.CORRECTED: [fixed for _, fixed in pairs]}
    categories = {
        name.value: np.array([YES if one else NO for one in values], dtype=np.str_) for name, values in columns.items()
    }
    return Sample(len(pairs), {}, categories)


def rating_bets(reference: Sample) -> list[Bet]:
    """Return a bet on more bad ratings, and one on more corrections. What gets better is no alarm."""
    return [
        Bet(name.value, upper_share(int((reference.categories[name.value] == YES).sum()), reference.size, _SURE), hits)
        for name, hits in ((RatingFeature.BAD, _bad), (RatingFeature.CORRECTED, _corrected))
    ]


def _bad(ratings: Sample) -> Hits:
    return _said(ratings, RatingFeature.BAD)


def _corrected(ratings: Sample) -> Hits:
    return _said(ratings, RatingFeature.CORRECTED)


def _said(ratings: Sample, feature: RatingFeature) -> Hits:
    return np.where(ratings.categories[feature.value] == YES, HIT, MISS).astype(np.int8)
