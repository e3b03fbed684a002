"""Decides from the traffic of a rollout whether its candidate passes.

Also estimates how much traffic proves a given loss. The estimate is approximate. It assumes that each unit is a single
request (with several requests per unit, smaller losses can be proven), and that a block, the short period in which both
versions are compared, has one candidate unit and the usual number of production units. The logarithm of a bet's wealth
is assumed to be normally distributed, with the mean and variance calculated exactly for one block. There is one bet for
each stake, and the initial wealth is divided equally among the bets. A loss is considered proven if at least one bet
proves it with 80% power. Latencies are assumed to be lognormal.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import NormalDist
from types import MappingProxyType

from serving.rollout.analysis.betting import STAKES, Budget
from serving.rollout.analysis.comparisons import PERCENTILE, Figure, LatencyComparison, Loss, ShareComparison
from serving.rollout.analysis.units import Arm, OncePerStep, Rating, Request, Unit, Units
from svc.evaluation.verdict import GateOutcome
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


class Signal(StrEnum):
    """A quantity that a rollout compares between candidate and production. For every signal, lower is better."""

    ERRORS = "errors"
    """Share of requests that failed because of the server."""
    INVALID = "invalid"
    """Share of invalid outputs."""
    FIRST_TOKEN = "first_token"  # noqa: S105
    """95th percentile of the time to the first token."""
    FEEDBACK = "feedback"
    """Share of bad ratings."""


TYPICAL_SHARES: Mapping[Signal, float] = MappingProxyType(
    {Signal.ERRORS: 0.01, Signal.INVALID: 0.02, Signal.FEEDBACK: 0.2}
)
"""Shares of errors, invalid outputs and bad ratings assumed for production before any traffic is measured."""


@dataclass(frozen=True)
class Margins:
    """For each signal, the largest amount by which the candidate may be worse than production: a ratio for
    `first_token`, and a difference in shares for all other signals.
    """

    errors: float = 0.01
    invalid: float = 0.01
    first_token: float = 1.2
    feedback: float = 0.05

    def __post_init__(self) -> None:
        if not (
            all(0 <= margin < 1 for margin in (self.errors, self.invalid, self.feedback)) and self.first_token >= 1
        ):
            raise ValueError(f"margins must be in [0, 1), except first_token, which must be at least 1, got {self}")


@dataclass(frozen=True, slots=True)
class SignalVerdict:
    """Comparison of candidate and production on one signal.

    Attributes:
        outcome: `failed` if the candidate is proven to be worse by more than the margin, `passed` if this is ruled out,
            else `undecided`.
        loss: how much worse the candidate is, or None until both arms have data in the same period.
        margin: how much worse the candidate may be.
    """

    signal: Signal
    outcome: GateOutcome
    loss: Loss | None
    margin: float
    production: Figure
    candidate: Figure

    @property
    def has_data(self) -> bool:
        """Whether both arms have data. A signal without data is undecided and does not delay the rollout."""
        return bool(self.production.units and self.candidate.units)


class Analysis:
    """The evidence that a rollout has collected over all its steps.

    Users and conversations stay with the candidate once they are assigned to it, and the evidence is never reset. The
    error budget therefore applies to the rollout as a whole.
    """

    def __init__(self, margins: Margins | None = None, budget: Budget | None = None) -> None:
        budget = budget or Budget()
        margins = margins or Margins()
        self._budget = each = replace(budget, wrong_rollback=budget.wrong_rollback / len(Signal))
        kinds = {signal: LatencyComparison if signal is Signal.FIRST_TOKEN else ShareComparison for signal in Signal}
        self._comparisons = {signal: kind(getattr(margins, signal), each) for signal, kind in kinds.items()}
        self._units = Units()
        self._raters = OncePerStep()

    def add(self, request: Request) -> None:
        """Add a finished request. Requests must be added in the order in which they ended."""
        for unit in self._units.add(request):
            self._add_unit(unit)

    def rate(self, rating: Rating) -> None:
        """Add a rating. Only the first rating from each user or conversation counts, except that those assigned to
        production may rate again in each step.
        """
        if self._raters.admit(rating.unit, rating.arm):
            self._comparisons[Signal.FEEDBACK].add(rating.arm, float(rating.negative))

    def start_step(self) -> None:
        """Start the next step of the rollout, in which the candidate's share grows."""
        for unit in self._units.start_step():
            self._add_unit(unit)
        self._raters.start_step()

    @property
    def units(self) -> int:
        """Number of the candidate's users, conversations or single requests whose observation is complete."""
        return self._comparisons[Signal.ERRORS].units(Arm.CANDIDATE)

    @property
    def outcomes(self) -> dict[Signal, GateOutcome]:
        """Outcome of each signal. Unlike `verdicts`, it is cheap enough to compute for every request."""
        return {signal: comparison.outcome() for signal, comparison in self._comparisons.items()}

    @property
    def outcome(self) -> GateOutcome:
        """Outcome of the rollout so far.

        `failed` if, for any signal, the candidate is proven to be worse by more than the margin; `passed` if this is
        ruled out for every signal with data except ratings. A rollout does not wait for ratings, because they are
        rare.
        """
        with_data = {
            signal: comparison.outcome()
            for signal, comparison in self._comparisons.items()
            if all(comparison.units(arm) for arm in Arm)
        }
        if GateOutcome.FAILED in with_data.values():
            return GateOutcome.FAILED
        with_data.pop(Signal.FEEDBACK, None)
        if with_data and set(with_data.values()) == {GateOutcome.PASSED}:
            return GateOutcome.PASSED
        return GateOutcome.UNDECIDED

    def detectable(
        self, units: int, share: float, production: Mapping[Signal, float] = TYPICAL_SHARES
    ) -> dict[Signal, float]:
        """Return, for each signal, how much worse the candidate must be for this rollout to detect it with 80% power.

        Args:
            units: planned number of candidate units with data for the signal; at least 1.
            share: the candidate's share of the units; above 0 and below 1.
            production: measured values of production for all signals that are shares (all except `first_token`).
        """
        error = self._budget.wrong_rollback
        return {
            signal: detectable_ratio(units, share, comparison.margin, error)
            if signal is Signal.FIRST_TOKEN
            else detectable_difference(units, share, production[signal], comparison.margin, error)
            for signal, comparison in self._comparisons.items()
        }

    def verdicts(self) -> tuple[SignalVerdict, ...]:
        """Return the verdict on each signal, including measured values and their limits.

        Takes about 10 ms once the candidate has 3,000 units (see `Unit`), so long rollouts call it in a thread.
        """
        return tuple(
            SignalVerdict(
                signal,
                comparison.outcome(),
                comparison.loss(),
                comparison.margin,
                comparison.figure(Arm.PRODUCTION),
                comparison.figure(Arm.CANDIDATE),
            )
            for signal, comparison in self._comparisons.items()
        )

    def _add_unit(self, unit: Unit) -> None:
        values = {Signal.ERRORS: unit.errors, Signal.INVALID: unit.invalid, Signal.FIRST_TOKEN: unit.first_token_s}
        for signal, value in values.items():
            if value is not None:
                self._comparisons[signal].add(unit.arm, value)
