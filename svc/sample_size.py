"""Sample size: how many paired examples detect a given difference, and which difference a given number detects.

A gate compares a loss with a limit, so the difference here is the distance of the loss from its limit.

Normal approximation for the mean of n paired differences with variance s^2, for a limit of a 95 % interval and a power
of 0.8 (any textbook; for evaluations: Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640):

    n = (z_0.975 + z_0.8)^2 s^2 / loss^2

For answers that are right or wrong, s^2 is at most the share of examples on which the two models differ (McNemar's
test: Connor 1987, Biometrics 43). Before two models have answered, that share is assumed.
"""

import math

Z_INTERVAL = 1.959964
"""Standard normal quantile at 0.975: the limits of a 95 % interval."""
_Z_POWER = 0.841621
"""Standard normal quantile at 0.8: a loss of that size is detected in four of five samples."""
ASSUMED_CHANGED = 0.1
"""Assumed share of answers that change between right and wrong, used until both models have answered."""


def detectable_loss(examples: int, variance: float = ASSUMED_CHANGED) -> float:
    """Return the smallest difference that this number of examples detects with 80 % power.

    Args:
        examples: at least 1.
        variance: variance of one example's difference.
    """
    return (Z_INTERVAL + _Z_POWER) * math.sqrt(variance / examples)


def examples_needed(loss: float, variance: float = ASSUMED_CHANGED) -> int:
    """Return the number of examples that detects a difference with 80 % power.

    Args:
        loss: above 0.
        variance: variance of one example's difference.
    """
    return max(1, math.ceil(variance * ((Z_INTERVAL + _Z_POWER) / loss) ** 2))


def about(examples: int) -> str:
    """Return a number of examples rounded up to two significant digits, because it is approximate."""
    step = 10 ** max(0, len(str(examples)) - 2)
    return f"{math.ceil(examples / step) * step:,}"


def say_detectable(examples: int, counted: str = "held-out examples") -> str:
    """Return a sentence on how far from its limit a loss must be for this number of examples to detect it."""
    return (
        f"{examples} {counted} detect a loss that is {detectable_loss(examples):.3f} or more from its limit, "
        f"in four of five samples, if {100 * ASSUMED_CHANGED:g} % of the answers change"
    )
