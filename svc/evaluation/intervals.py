"""Computes estimates with 95% confidence intervals. No figure is reported without its uncertainty."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from svc.sample_size import Z_INTERVAL

Floats = NDArray[np.float64]
_RESAMPLES = 2000
_BATCH = 1_000_000
"""Number of indices to draw at a time. Drawing all at once would take gigabytes for 100,000 examples."""

Statistic = Callable[[Floats], Floats]
"""Function that computes a statistic for each resample. Its argument has one row per resample, which
contains the number of times that each example was drawn."""


class Interval(BaseModel):
    """A value together with its 95% confidence interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def proportion(hits: int, total: int) -> Interval:
    """Return the proportion of hits with its Wilson score interval, which remains valid near 0 and 1 (Wilson 1927).

    Raises:
        ValueError: `total` is 0.
    """
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"hits must be between 0 and a positive total, got {hits} hits of {total}")
    from scipy.stats import binomtest

    interval = binomtest(hits, total).proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(value=hits / total, low=float(interval.low), high=float(interval.high))


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
    """Return the mean of the values with its bootstrap interval.

    Args:
        weights: weight of each value, or None for equal weights. At least one must be nonzero. A resample draws
            each value together with its weight.

    Raises:
        ValueError: there are no values.
    """
    return bootstrap(len(values), weighted_mean(values, weights))


def weighted_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> Statistic:
    """Return a `Statistic` that computes the weighted mean of the given values."""
    weight = np.ones(len(values)) if weights is None else np.array(weights, dtype=float)
    weighted = np.array(values, dtype=float) * weight

    def statistic(drawn: Floats) -> Floats:
        return np.asarray(drawn @ weighted / (drawn @ weight))

    return statistic


def paired_difference(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None
) -> Interval:
    """Return the mean of the paired differences, second minus first, with its bootstrap interval.

    Pairing cancels out differences in difficulty between examples.

    Args:
        weights: weight of each example, or None for equal weights.
    """
    return mean([after - before for before, after in zip(first, second, strict=True)], weights)


def share_difference(differences: Sequence[float]) -> Interval:
    """Return the mean of paired share differences, each between -1 and 1, with its adjusted Wald interval.

    The adjustment adds one difference of 1 and one of -1 (Bonett and Price 2012, J. Educ. Behav. Stat. 37,
    who define it for right-or-wrong answers). Unlike a bootstrap interval, the result therefore does not
    shrink to a point if no answer changes. With 50 or more examples, it excludes 0 only if at least six answers
    change in the same direction.

    Raises:
        ValueError: there are no differences.
    """
    if not differences:
        raise ValueError("no differences")
    values = np.array(differences, dtype=float)
    total = len(values) + 2
    centre = float(values.sum()) / total
    variance = (float((values**2).sum()) + 2) / total - centre**2
    half = Z_INTERVAL * math.sqrt(variance / total)
    return Interval(value=float(values.mean()), low=max(-1.0, centre - half), high=min(1.0, centre + half))


def bootstrap(examples: int, statistic: Statistic) -> Interval:
    """Return a statistic's value over all examples, with its bootstrap percentile interval. The seed is fixed.

    A resample is represented by the number of times that each example was drawn, so that the statistic can be computed
    for thousands of resamples as a matrix product.

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("no examples")
    generator = np.random.default_rng(0)
    rows = max(1, _BATCH // examples)
    drawn = []
    for start in range(0, _RESAMPLES, rows):
        count = min(rows, _RESAMPLES - start)
        places = generator.integers(0, examples, (count, examples)) + examples * np.arange(count)[:, None]
        counts = np.bincount(places.ravel(), minlength=count * examples).reshape(count, examples)
        drawn.append(statistic(counts.astype(float)))
    resampled = np.sort(np.concatenate(drawn))
    edge = round(_RESAMPLES * 0.025)
    value = float(statistic(np.ones((1, examples)))[0])
    return Interval(value=value, low=float(resampled[edge]), high=float(resampled[-edge - 1]))


def mean_or_proportion(values: Sequence[float]) -> Interval:
    """Return the mean of the values with its interval.

    The interval is Wilson's score interval if all values are 0 or 1, and a bootstrap interval otherwise.
    """
    if values and set(values) <= {0, 1}:
        return proportion(round(math.fsum(values)), len(values))
    return mean(values)
