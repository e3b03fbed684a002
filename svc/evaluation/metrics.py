"""Figures with intervals; no figure is given without its uncertainty."""

import json
import math
import random
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

_RESAMPLES = 2000


class Estimate(BaseModel):
    """A value with its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def proportion(hits: int, total: int) -> Estimate:
    """Share of hits with Wilson's score interval, which stays right near 0 and 1 (Wilson 1927).

    Raises:
        ValueError: nothing was counted.
    """
    if not 0 <= hits <= total or total == 0:
        raise ValueError(f"{hits} hits of {total}")
    from scipy.stats import binomtest

    interval = binomtest(hits, total).proportion_ci(confidence_level=0.95, method="wilson")
    return Estimate(value=hits / total, low=float(interval.low), high=float(interval.high))


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Mean with a percentile bootstrap interval (seeded: equal values, equal interval).

    SciPy's bootstrap draws from another generator: it moves the printed interval in its last digit, and with it the
    figures of versions that are registered.

    Args:
        weights: of the values, not all 0; what is drawn anew is a value with its weight. None: all count the same.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values")
    pairs = list(zip(values, weights or [1.0] * len(values), strict=True))
    generator = random.Random(0)  # noqa: S311 - a resampling, no secret
    means = sorted(_weighted_mean(generator.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLES))
    edge = round(_RESAMPLES * 0.025)
    return Estimate(value=_weighted_mean(pairs), low=means[edge], high=means[-edge - 1])


def _weighted_mean(pairs: Sequence[tuple[float, float]]) -> float:
    return math.fsum(value * weight for value, weight in pairs) / math.fsum(weight for _, weight in pairs)


def paired_difference(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float] | None = None
) -> Estimate:
    """Mean of second minus first, example by example, with its interval: what both find hard cancels out.

    Args:
        weights: of the examples; None: all count the same.
    """
    return mean([after - before for before, after in zip(first, second, strict=True)], weights)


def matches(answer: str, reference: str) -> bool:
    """Exact match but for white space around."""
    return answer.strip() == reference.strip()


def is_json(text: str) -> bool:
    """Whether the text is one valid JSON object or array."""
    try:
        return isinstance(json.loads(text, parse_constant=_refuse_constant), dict | list)
    except (ValueError, RecursionError):  # a model that repeats "[" nests too deeply
        return False


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
