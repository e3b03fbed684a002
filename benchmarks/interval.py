"""Computes the confidence interval of the mean for a few measurements."""

import statistics
from collections.abc import Sequence

_CONFIDENCE = 0.95


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% confidence interval of the mean by Student's t. It is infinite for a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return -float("inf"), float("inf")
    half = t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    return mean - half, mean + half
