"""Measures how far a feature has shifted, using the population stability index (PSI)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svc.drift_reference.sample import NOT_THERE, Floats, Names

_BINS = 10
_HALF = 0.5  # added to counts, so that an empty bin does not make the index infinite (Jeffreys)


@dataclass(frozen=True, slots=True)
class Stability:
    """The population stability index, which measures the size of a shift but not its certainty.

    By convention, values above 0.2 count as a shift.

    Attributes:
        index: the population stability index itself.
        by_chance: mean of the index without a shift, which is large for small samples: (bins - 1) times the
            sum of the inverse sample sizes (Yurdakul and Naranjo 2020).
    """

    index: float
    by_chance: float

    @property
    def beyond_chance(self) -> float:
        """Return `index` minus `by_chance`, or 0 if that is negative.

        The conventional limit for a population stability index, 0.2, can be applied to the result regardless of the
        sample size.
        """
        return max(0.0, self.index - self.by_chance)


def number_stability(reference: Floats, live: Floats) -> Stability:
    """Return the stability index of a numeric feature, using the reference's deciles as bins.

    Missing values are ignored.
    """
    reference, live = reference[~np.isnan(reference)], live[~np.isnan(live)]
    if not len(reference) or not len(live):
        return Stability(0.0, 0.0)
    deciles = np.quantile(reference, np.linspace(0, 1, _BINS + 1)[1:-1])
    # A value that is several deciles gets its own bin; otherwise a move to values below it would not be a shift.
    repeated = deciles[1:][deciles[1:] == deciles[:-1]]
    edges = np.unique(np.concatenate([deciles, np.nextafter(repeated, -np.inf)]))
    counts = [np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1) for values in (reference, live)]
    return _stability(*counts)


def category_stability(reference: Names, live: Names) -> Stability:
    """Return the stability index of a categorical feature, using all categories found in either sample.

    Missing values are ignored.
    """
    reference, live = reference[reference != NOT_THERE], live[live != NOT_THERE]
    if not len(reference) or not len(live):
        return Stability(0.0, 0.0)
    names = np.union1d(reference, live)
    return _stability(*(np.array([(values == name).sum() for name in names]) for values in (reference, live)))


def _stability(reference: NDArray[np.int_], live: NDArray[np.int_]) -> Stability:
    bins = int(((reference + live) > 0).sum())
    expected, actual = ((counts + _HALF) / (counts.sum() + _HALF * len(counts)) for counts in (reference, live))
    index = float(((actual - expected) * np.log(actual / expected)).sum())
    return Stability(index, (bins - 1) * (1 / int(reference.sum()) + 1 / int(live.sum())))
