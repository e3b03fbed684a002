"""Calculates in advance the smallest loss that a rollout can prove with a given number of candidate units (users,
conversations or requests). A loss is the amount by which the candidate is worse than production.

The result is approximate. It assumes that each unit is a single request (with several requests per unit, smaller losses
can be proven), and that a block, the short period in which both versions are compared, has one candidate unit and the
usual number of production units. The logarithm of a bet's wealth is assumed to be normally distributed, with the mean
and variance calculated exactly for one block. There is one bet for each stake, and the initial wealth is
divided equally among the bets. A loss is considered proven if at least one bet proves it with 80% power. Latencies are
assumed to be lognormal.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

from serving.rollout.analysis.betting import STAKES
from serving.rollout.analysis.comparisons import PERCENTILE
from svc.sample_size import Z_POWER

_SIGMA = 0.5
"""Assumed standard deviation of the logarithm of a latency. With this value, the 95th percentile is 2.3 times the
median."""
_MAX_RATIO = 100.0
_BISECTIONS = 30


def detectable_difference(units: int, share: float, production: float, margin: float, error: float) -> float:
    """Return the smallest difference in shares that can be detected as exceeding the margin with 80% power.

    Args:
        units: number of units (users, conversations or single requests) assigned to the candidate; at least 1.
        share: the candidate's share of the units; above 0 and below 1.
        production: the share in production, such as its share of failed requests.
        error: allowed probability of wrongly concluding that the margin is exceeded.

    Returns:
        The difference, or 1 if not even the largest difference can be detected.
    """
    return _smallest(
        lambda loss: _is_proven(units, share, min(1.0, production + loss), production, margin, error), margin, 1.0
    )


def detectable_ratio(units: int, share: float, margin: float, error: float) -> float:
    """Return the smallest ratio of 95th percentiles that can be detected as exceeding the margin with 80% power.

    Args:
        units, share, error: as in `detectable_difference`.

    Returns:
        The ratio, at most 100.
    """
    normal = NormalDist()
    quantile = normal.inv_cdf(PERCENTILE)

    def proven(ratio: float) -> bool:
        above = 1 - normal.cdf(quantile - math.log(ratio / margin) / _SIGMA)
        return _is_proven(units, share, above, 1 - PERCENTILE, 0.0, error)

    return _smallest(proven, margin, _MAX_RATIO)


def _smallest(proven: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if proven(middle) else (middle, high)
    return high


def _is_proven(units: int, share: float, candidate: float, production: float, margin: float, error: float) -> bool:
    """Return whether a bet with one of the stakes has at least 80% power to prove a difference beyond the margin.

    Args:
        candidate, production: share of each arm's units in which the event occurs.
    """
    # A block may contain several candidate units before the first one of production.
    blocks = units / (1 + share / (1 - share) - share)
    # Production's part of a block: one of `others` units has the event, or none.
    others = (1 - share) / share
    events = min(1.0, production * max(1.0, others))
    outcomes = [
        (chance * other_chance, (value - other_value - margin) / (1 + margin))
        for value, chance in ((1.0, candidate), (0.0, 1 - candidate))
        for other_value, other_chance in ((production / events if events else 0.0, events), (0.0, 1 - events))
    ]
    needed = math.log(len(STAKES) / error)
    for stake in STAKES:
        logs = [(chance, math.log1p(stake * payoff)) for chance, payoff in outcomes]
        mean = sum(chance * log for chance, log in logs)
        variance = sum(chance * (log - mean) ** 2 for chance, log in logs)
        if blocks * mean - Z_POWER * math.sqrt(blocks * variance) >= needed:
            return True
    return False
