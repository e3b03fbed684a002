"""Defines the bets by which drift detection tests a stream of requests.

Each bet is on a set of feature values, which is chosen before an item arrives. The share of items in the
set counts as normal as long as it does not exceed the bet's bound: `SLACK` times the upper limit of the 90% Wilson
interval for the share of reference items in the set. Daily cycles, weekends and growing traffic from one client change
the shares of topics and lengths by less than this bound allows, so they do not count as drift.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from monitoring.drift.evidence import HIT, MISS, NOT_THERE, Hits
from svc.drift_reference import sample
from svc.drift_reference.sample import Floats, Names, Sample

SLACK, SURE = 2.0, 1.64
_MAX_BOUND = 0.7
"""A `Bet` whose `bound` is this value or larger is not used: in normal traffic, so many values may be in its set that
it could hardly detect a change."""
_TAILS = (0.0, 0.02, 0.1)
"""Sizes of the tails for which a numeric feature gets bets. A size is the fraction of the reference in both tails
combined. Tails of size 0 contain only values outside the reference's range."""
_MIN_SHARE = 0.02
"""A category gets a bet of its own if at least this fraction of the reference is in it. Rarer and new categories share
a single bet."""


@dataclass(frozen=True)
class Bet:
    """A bet that a feature's values fall into a given set.

    Attributes:
        bound: traffic counts as normal as long as the probability of a value being in the set does not exceed this.
        contains: function that returns, for each value of the feature, whether it is in the set.
    """

    feature: str
    bound: float
    contains: Callable[[Floats | Names], NDArray[np.bool_]]

    def hits(self, items: Sample) -> Hits:
        """Return, for each item, whether its value is in the set, is not in it, or is missing."""
        if self.feature in items.numbers:
            values: Floats | Names = items.numbers[self.feature]
            missing = np.isnan(values)
        else:
            values = items.categories[self.feature]
            missing = values == sample.NOT_THERE
        return np.where(missing, NOT_THERE, np.where(self.contains(values), HIT, MISS)).astype(np.int8)


def upper_limit(count: int, size: int, z: float) -> float:
    """Return the upper end of a proportion's Wilson interval.

    Args:
        z: half width of the interval in standard errors.
    """
    share = count / size
    middle = share + z * z / (2 * size)
    return float((middle + z * np.sqrt(share * (1 - share) / size + z * z / (4 * size * size))) / (1 + z * z / size))


def feature_bets(reference: Sample) -> list[Bet]:
    """Return the bets on the features of a reference sample.

    Each bet is on a set of values. For a numeric feature, the set is one of its tails. For a categorical feature, it is
    a frequent category, the rare categories, or the new categories.
    """
    bets = [bet for name, values in reference.numbers.items() for bet in _tail_bets(name, values)]
    bets += [bet for name, values in reference.categories.items() for bet in _category_bets(name, values)]
    return [bet for bet in bets if bet.bound < _MAX_BOUND]


def _tail_bets(name: str, values: Floats) -> list[Bet]:
    there = values[~np.isnan(values)]
    bets = list[Bet]()
    for share in _TAILS if len(there) else ():
        low, high = (float(limit) for limit in np.quantile(there, (share / 2, 1 - share / 2)))
        bets.append(Bet(name, _bound((there < low).sum(), len(there)), partial(np.greater, low)))  # low > value
        bets.append(Bet(name, _bound((there > high).sum(), len(there)), partial(np.less, high)))  # high < value
    return bets


def _category_bets(name: str, values: Names) -> list[Bet]:
    there = values[values != sample.NOT_THERE]
    if not len(there):
        return []
    names, counts = np.unique(there, return_counts=True)
    frequent = counts >= _MIN_SHARE * len(there)
    # The share of new categories is estimated by those seen once (Good 1953): all, if system prompts contain a date.
    bets = [Bet(name, _bound((counts == 1).sum(), len(there)), partial(np.isin, test_elements=names, invert=True))]
    if not frequent.all():
        rare = _bound(counts[~frequent].sum(), len(there))
        bets.append(Bet(name, rare, partial(np.isin, test_elements=names[frequent], invert=True)))
    for category, count in zip(names[frequent], counts[frequent], strict=True):
        bets.append(Bet(name, _bound(count, len(there)), partial(np.equal, category)))
    return bets


def _bound(count: int, size: int) -> float:
    return SLACK * upper_limit(count, size, SURE)


def hit_table(bets: Sequence[Bet], items: Sample) -> Hits:
    """Return a table (items x bets) that shows, for each bet, which items are in its set."""
    if not bets:
        return np.zeros((items.size, 0), dtype=np.int8)
    return np.stack([bet.hits(items) for bet in bets], axis=1)
