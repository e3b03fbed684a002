"""Uses bets to collect evidence on a candidate's loss, that is, how much worse it is than production. The evidence may
be evaluated at any time.

A bet stakes a fraction c of its wealth on a payoff of at least -1, which multiplies the wealth by 1 + c *
payoff. If the payoffs are at most 0 on average, regardless of earlier payoffs, the probability that the wealth ever
reaches 1 / a is at most a (Ville's inequality). Therefore, no fixed sample size is needed, and frequent checks do not
cause more wrong decisions (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", J.
R. Stat. Soc. B 86).

A difference between -1 and 1 gives two payoffs: `proof` is at most 0 on average if the mean difference is
at most a bound, `exclusion` if the mean difference is at least the bound. The bounds that are not refuted
form a confidence sequence.

The initial wealth is divided among a few fixed stakes. Adaptive stakes (aGRAPA, in the same paper) prove losses equally
early, but rarely rule out a loss of one percentage point: they stop betting after an early loss that is due to chance,
and need 1.5 to more than 3 times as many units.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svc.evaluation.verdict import GateOutcome

Floats = NDArray[np.float64]

STAKES = (0.1, 0.2, 0.4, 0.8)
"""The fraction of its wealth that each of four parallel bets stakes on every payoff. If the candidate is much worse
than production, the largest fraction proves it within 50 candidate units (such as users). The smallest works best for
frequent events if the candidate is worse by about the margin."""
_MAX_WEALTH = 1e100  # far beyond any decision, and far from overflow
_BISECTIONS = 20


@dataclass(frozen=True)
class Budget:
    """Allowed probabilities of wrong decisions in one rollout.

    Attributes:
        wrong_rollback: probability of finding on any signal that the candidate is worse than production by more than
            the margin, although it is not.
        wrong_advance: probability of ruling this out on all signals, although the candidate is worse by more than the
            margin on at least one. The budget is not divided among signals: a candidate that is worse on one signal
            advances only if that signal's verdict is wrong.
    """

    wrong_rollback: float = 0.005
    wrong_advance: float = 0.05

    def __post_init__(self) -> None:
        if not (0 < self.wrong_rollback < 1 and 0 < self.wrong_advance < 1):
            raise ValueError(f"probabilities must be between 0 and 1, got {self}")


def proof(differences: Floats, bound: float) -> Floats:
    """Return, for each difference, the payoff of a bet that the mean difference exceeds `bound`.

    If it does not exceed `bound`, the mean payoff is at most 0.

    Args:
        bound: must be above -1.
    """
    return (differences - bound) / (1 + bound)


def exclusion(differences: Floats, bound: float) -> Floats:
    """Return, for each difference, the payoff of a bet that the mean difference is below `bound`.

    If it is at least `bound`, the mean payoff is at most 0.

    Args:
        bound: must be below 1.
    """
    return (bound - differences) / (1 - bound)


def wealth(payoffs: Floats, counts: Floats | float = 1.0) -> float:
    """Return the wealth after all bets with these payoffs. The initial wealth is 1.

    Args:
        counts: how often each payoff occurred.
    """
    with np.errstate(over="ignore"):
        return float(np.mean([np.exp(np.sum(counts * np.log1p(stake * payoffs))) for stake in STAKES]))


class Evidence:
    """Evidence for and against the claim that a mean difference exceeds a margin.

    Args:
        margin: at least 0 and below 1.
    """

    def __init__(self, margin: float) -> None:
        self._margin = margin
        self._proof = [1.0] * len(STAKES)
        self._exclusion = [1.0] * len(STAKES)

    def add(self, difference: float) -> None:
        """Update the evidence with one measured difference, which must be between -1 and 1."""
        beyond = difference - self._margin
        self._proof = _bet(self._proof, beyond / (1 + self._margin))
        self._exclusion = _bet(self._exclusion, -beyond / (1 - self._margin))

    def outcome(self, budget: Budget) -> GateOutcome:
        """Return `FAILED` if the mean difference is proven to exceed the margin, `PASSED` if this is ruled out, and
        `UNDECIDED` otherwise.
        """
        if sum(self._proof) / len(STAKES) >= 1 / budget.wrong_rollback:
            return GateOutcome.FAILED
        if sum(self._exclusion) / len(STAKES) >= 1 / budget.wrong_advance:
            return GateOutcome.PASSED
        return GateOutcome.UNDECIDED


def _bet(before: list[float], payoff: float) -> list[float]:
    return [min(each * (1 + stake * payoff), _MAX_WEALTH) for each, stake in zip(before, STAKES, strict=True)]


def limits(
    proof_at: Callable[[float], float],
    exclusion_at: Callable[[float], float],
    budget: Budget,
    between: tuple[float, float],
) -> tuple[float, float]:
    """Return anytime-valid confidence limits of a loss, which is how much worse the candidate is than production.

    The lower limit is the largest bound for which the claim `loss <= bound` is refuted. The upper limit is the smallest
    bound for which the claim `loss >= bound` is refuted. Each limit has the error probability of the corresponding
    decision: the lower limit is above the margin if and only if a loss is proven, and the upper limit is at most the
    margin if a loss is ruled out.

    Args:
        proof_at: function that takes a bound and returns the wealth of a bet against the claim `loss <= bound`. The
            wealth falls as the bound rises.
        exclusion_at: function that takes a bound and returns the wealth of a bet against the claim `loss >= bound`.
            The wealth rises with the bound.
        between: range of the loss. If a limit's claim is not refuted for any bound, the limit is the corresponding end
            of the range.
    """
    lowest, highest = between
    low = last_refuted(lambda bound: proof_at(bound) >= 1 / budget.wrong_rollback, lowest, highest)
    high = last_refuted(lambda bound: exclusion_at(bound) >= 1 / budget.wrong_advance, highest, lowest)
    return low, high


def last_refuted(refuted: Callable[[float], bool], end: float, other: float) -> float:
    """Search from `end` toward `other` for the last refuted bound. Return `end` if none is refuted."""
    if not refuted(end):
        return end
    for _ in range(_BISECTIONS):
        middle = (end + other) / 2
        if refuted(middle):
            end = middle
        else:
            other = middle
    return end


def difference_limits(differences: Mapping[float, int], budget: Budget) -> tuple[float, float]:
    """Return anytime-valid confidence limits of a mean difference.

    Args:
        differences: how often each difference occurred.
    """
    values = np.fromiter(differences, dtype=float, count=len(differences))
    counts = np.fromiter(differences.values(), dtype=float, count=len(differences))
    return limits(
        lambda bound: wealth(proof(values, bound), counts),
        lambda bound: wealth(exclusion(values, bound), counts),
        budget,
        (-0.999, 0.999),
    )
