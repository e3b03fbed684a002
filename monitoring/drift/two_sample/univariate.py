"""Has one readable feature moved? Exact tests for the alarm, and the population stability index for the size.

A feature of numbers is compared by Kolmogorov and Smirnov's test, one of categories by Fisher's exact test of each
category against all others, times the number of categories. Both are exact for any sizes, and too cautious where values
are equal, never too bold.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svc.drift_reference.sample import NOT_THERE, Floats, Names

_FEWEST = 5
"""Values on each side; with fewer there is nothing to say."""
_ROUGHLY = 0.1
_MOST_TESTED = 5
_BINS = 10
_SAME = 1e-7  # relative; tables on both sides that are equally likely, but for rounding
_HALF = 0.5  # counts are raised by it, so that an empty bin does not make the index infinite (Jeffreys)


def compare_numbers(reference: Floats, live: Floats) -> float:
    """The p-value of Kolmogorov and Smirnov's two-sample test; values that are not there are left out.

    Exact where it is small. Elsewhere it is the limit for large samples, which takes a tenth of the time.
    """
    from scipy.special import kolmogorov
    from scipy.stats import ks_2samp

    reference, live = np.sort(reference[~np.isnan(reference)]), np.sort(live[~np.isnan(live)])
    if min(len(reference), len(live)) < _FEWEST:
        return 1.0
    values = np.concatenate([reference, live])
    below = (np.searchsorted(one, values, side="right") / len(one) for one in (reference, live))
    distance = float(np.abs(np.subtract(*below)).max())
    limit = float(kolmogorov(distance * np.sqrt(len(reference) * len(live) / len(values))))
    return limit if limit > _ROUGHLY else float(ks_2samp(reference, live, method="exact").pvalue)


def compare_categories(reference: Names, live: Names) -> float:
    """The p-value of the category whose share moved most surely, times the number of categories."""
    reference, live = reference[reference != NOT_THERE], live[live != NOT_THERE]
    if min(len(reference), len(live)) < _FEWEST:
        return 1.0
    names = np.union1d(reference, live)
    if len(names) < 2:
        return 1.0
    held, seen = (np.array([(values == name).sum() for name in names]) for values in (reference, live))
    # Those whose shares differ most; of all others, which may be a thousand, the p-value is larger or nearly so.
    most = np.argsort(-np.abs(seen / len(live) - held / len(reference)))[:_MOST_TESTED]
    # With two categories, one test says it all.
    count = 1 if len(names) == 2 else len(names)
    return min(1.0, count * min(fisher(int(seen[i]), len(live), int(held[i]), len(reference)) for i in most))


def fisher(ones: int, size: int, others: int, other_size: int) -> float:
    """The p-value of Fisher's two-sided exact test: of all tables with its sums, those that are no likelier than it.

    SciPy's, to the twelfth digit, in a twentieth of its time: each look at a window takes five of them.

    Args:
        ones, others: how many of each sample are of a category.
        size, other_size: of the samples.
    """
    from scipy.special import gammaln

    total = ones + others
    found = np.arange(max(0, total - other_size), min(total, size) + 1)
    parts = (found, total - found, size - found, other_size - total + found)
    logs = -sum(gammaln(part + 1) for part in parts)
    likely = np.exp(logs - logs.max())
    no_likelier = likely <= likely[ones - found[0]] * (1 + _SAME)
    return float(likely[no_likelier].sum() / likely.sum())


def compare_shares(reference: Names, live: Names, name: str) -> float:
    """The p-value of a category's share having grown: Fisher's exact test, one-sided."""
    from scipy.stats import fisher_exact

    reference, live = reference[reference != NOT_THERE], live[live != NOT_THERE]
    if min(len(reference), len(live)) < _FEWEST:
        return 1.0
    ones, others = int((live == name).sum()), int((reference == name).sum())
    table = [[ones, len(live) - ones], [others, len(reference) - others]]
    return float(fisher_exact(table, alternative="greater").pvalue)


@dataclass(frozen=True, slots=True)
class Stability:
    """The population stability index: how large a shift is, not how sure. By custom, above 0.2 is a shift.

    Attributes:
        index: as it is customary.
        by_chance: what it is in the mean where nothing has moved, which is much for small samples: the bins less one
            times the sum of the inverse sizes (Yurdakul and Naranjo 2020).
    """

    index: float
    by_chance: float

    @property
    def beyond_chance(self) -> float:
        """What is left, at least 0: it can be compared with the customary limits for samples of any size."""
        return max(0.0, self.index - self.by_chance)


def number_stability(reference: Floats, live: Floats) -> Stability:
    """Over the reference's deciles; values that are not there are left out."""
    reference, live = reference[~np.isnan(reference)], live[~np.isnan(live)]
    if not len(reference) or not len(live):
        return Stability(0.0, 0.0)
    deciles = np.quantile(reference, np.linspace(0, 1, _BINS + 1)[1:-1])
    # A value that is several deciles has a bin of its own, or what lies below it would be no shift.
    repeated = deciles[1:][deciles[1:] == deciles[:-1]]
    edges = np.unique(np.concatenate([deciles, np.nextafter(repeated, -np.inf)]))
    counts = [np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1) for values in (reference, live)]
    return _stability(*counts)


def category_stability(reference: Names, live: Names) -> Stability:
    """Over all categories of either; those that are not there are left out."""
    reference, live = reference[reference != NOT_THERE], live[live != NOT_THERE]
    if not len(reference) or not len(live):
        return Stability(0.0, 0.0)
    names = np.union1d(reference, live)
    return _stability(*(np.array([(values == name).sum() for name in names]) for values in (reference, live)))


def false_discovery_rates(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values.

    Who names all features below 0.05 names, of those, at most one in twenty falsely on average.
    """
    from scipy.stats import false_discovery_control

    return [float(value) for value in false_discovery_control(p_values)] if p_values else []


def _stability(reference: NDArray[np.int_], live: NDArray[np.int_]) -> Stability:
    bins = int(((reference + live) > 0).sum())
    expected, actual = ((counts + _HALF) / (counts.sum() + _HALF * len(counts)) for counts in (reference, live))
    index = float(((actual - expected) * np.log(actual / expected)).sum())
    return Stability(index, (bins - 1) * (1 / int(reference.sum()) + 1 / int(live.sum())))
