"""Sample-size estimates: how many paired examples are needed to detect a given difference, and what
difference a given number of examples can detect.

A gate compares a quality loss with a limit, so the difference here is the distance of the loss from its limit.

The estimates use the normal approximation for the mean of n paired differences with variance s^2. A loss counts as
detected if its 95% interval excludes the limit, and the power is 0.8 (see any textbook or, for evaluations, Miller
2024, "Adding Error Bars to Evals", arXiv:2411.00640):

    n = (z_0.975 + z_0.8)^2 s^2 / difference^2

For answers that are right or wrong, s^2 is at most the share of examples on which the two models differ (McNemar's
test: Connor 1987, Biometrics 43). Until both models have answered, this share has to be assumed.
"""

import math

Z_INTERVAL = 1.959964
"""Standard normal quantile at 0.975, used for the bounds of a 95% interval."""
Z_POWER = 0.841621
"""Standard normal quantile at 0.8, for a power of 80%: a difference of the assumed size is detected in four of
five samples."""
ASSUMED_CHANGED = 0.1
"""Assumed share of answers that change between right and wrong. It is used until both models have answered."""


def detectable_loss(examples: int, variance: float = ASSUMED_CHANGED) -> float:
    """Return the smallest difference that can be detected with 80% power from the given number of examples.

    Args:
        examples: number of paired examples, at least 1.
        variance: variance of one example's difference.
    """
    return (Z_INTERVAL + Z_POWER) * math.sqrt(variance / examples)


def examples_needed(loss: float, variance: float = ASSUMED_CHANGED) -> int:
    """Return the number of examples needed to detect the given difference with 80% power.

    Args:
        loss: difference to detect, above 0.
        variance: variance of one example's difference.
    """
    return max(1, math.ceil(variance * ((Z_INTERVAL + Z_POWER) / loss) ** 2))


def about(examples: int) -> str:
    """Format an estimated number of examples, rounded up to two significant digits."""
    step = 10 ** max(0, len(str(examples)) - 2)
    return f"{math.ceil(examples / step) * step:,}"


def say_detectable(examples: int, counted: str = "held-out examples") -> str:
    """Return a sentence saying how far a quality loss must be from its limit to be detected with this many examples."""
    return (
        f"{examples} {counted} are enough to detect, with 80% power, a loss that differs from its limit by at least "
        f"{detectable_loss(examples):.3f}, assuming that {100 * ASSUMED_CHANGED:g}% of the answers change"
    )
