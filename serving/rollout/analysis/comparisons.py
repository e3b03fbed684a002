"""Compares candidate and production on one signal: a share, such as that of failed requests, or the 95th percentile of
a latency.

Effects of the time of day, load and outages therefore cancel out.
"""

import math
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from serving.rollout.analysis.betting import (
    Budget,
    Evidence,
    Floats,
    difference_limits,
    exclusion,
    last_refuted,
    limits,
    proof,
    wealth,
)
from serving.rollout.analysis.units import Arm
from svc.evaluation.verdict import GateOutcome

PERCENTILE = 0.95
_MIN_PRODUCTION = 50
"""Number of production units needed before production's 95th percentile is first estimated. Latencies are not compared
until then."""
_MAX_PRODUCTION = 200
"""Number of production's newest units from which its 95th percentile is estimated. The percentile of all units would
stay too high after a time of slow answers, for example while the candidate's engine started, and few of production's
later units would exceed it: a real rollout then needed 758 requests of the candidate instead of 399."""
_RATIOS = (0.01, 100.0)
_FIGURE_ERROR = 0.05
"""Probability that a percentile ever lies outside the limits displayed for it."""
_RESOLUTION = math.log(1.01)
"""Relative width of the histogram's logarithmic bins: 1%."""
_SHORTEST_S, _LONGEST_S = 1e-4, 1e5
_BINS = math.ceil(math.log(_LONGEST_S / _SHORTEST_S) / _RESOLUTION) + 1


class Times:
    """A fixed-size histogram of durations in seconds."""

    def __init__(self) -> None:
        self._counts = [0] * _BINS
        self._highest = 0
        self.count = 0

    def add(self, seconds: float) -> None:
        if not _SHORTEST_S <= seconds <= _LONGEST_S:
            seconds = min(max(seconds, _SHORTEST_S), _LONGEST_S)
        place = int(math.log(seconds / _SHORTEST_S) / _RESOLUTION)
        self._counts[place] += 1
        self.count += 1
        if place > self._highest:
            self._highest = place

    def quantile(self, share: float) -> float:
        """Return a quantile of the times, rounded up by at most 1%.

        Raises:
            ValueError: no times have been recorded.
        """
        if not self.count:
            raise ValueError("no times")
        return self._upper_edge(self._bin(math.ceil(share * self.count)))

    def limits(self, share: float, error: float) -> tuple[float, float | None]:
        """Return anytime-valid confidence limits of a quantile.

        The method is from Howard and Ramdas 2022, "Sequential estimation of quantiles with applications to A/B testing
        and best-arm identification", Bernoulli 28, equation 3 (an iterated-logarithm bound).

        Args:
            error: allowed probability that the quantile is ever outside the limits.

        Returns:
            The lower limit (0 if unknown) and the upper limit (None if unknown).
        """
        if not self.count:
            return 0.0, None
        rate = (1.4 * math.log(math.log(2.1 * max(self.count, 1))) + math.log(10 / error)) / self.count
        width = 1.5 * math.sqrt(share * (1 - share) * rate) + 0.8 * rate
        below, above = math.floor((share - width) * self.count), math.ceil((share + width) * self.count) + 1
        low = self._lower_edge(self._bin(below)) if below >= 1 else 0.0
        return low, self._upper_edge(self._bin(above)) if above <= self.count else None

    def _bin(self, rank: int) -> int:
        """Return the histogram bin that contains the time with the given rank.

        Rank 1 is the shortest time. The search starts from the longest times, which is faster for high quantiles.
        """
        place, above = self._highest, self.count - rank
        while (above := above - self._counts[place]) >= 0:
            place -= 1
        return place

    @staticmethod
    def _lower_edge(place: int) -> float:
        return _SHORTEST_S * math.exp(place * _RESOLUTION)

    @staticmethod
    def _upper_edge(place: int) -> float:
        return _SHORTEST_S * math.exp((place + 1) * _RESOLUTION)


@dataclass(slots=True)
class Block:
    """Observations from one period. A complete block contains at least one unit (such as a user) from each arm.

    At a candidate share of 5%, a block has one candidate unit and about 19 production units.
    """

    production: list[float] = field(default_factory=list)
    candidate: list[float] = field(default_factory=list)

    @property
    def difference(self) -> float:
        """Mean of the candidate's observations minus mean of production's."""
        return sum(self.candidate) / len(self.candidate) - sum(self.production) / len(self.production)


class Blocks:
    """Divides a sequence of observations into blocks. A block ends as soon as it contains an observation of
    each version.

    Attributes:
        open: the block that is not complete yet.
    """

    def __init__(self) -> None:
        self.open = Block()

    def add(self, arm: Arm, value: float) -> Block | None:
        """Add the observation of one unit (such as a user). Return the block that it completes, or None."""
        block = self.open
        if arm is Arm.CANDIDATE:
            block.candidate.append(value)
            complete = block.production
        else:
            block.production.append(value)
            complete = block.candidate
        if not complete:
            return None
        self.open = Block()
        return block


@dataclass(frozen=True, slots=True)
class Figure:
    """Measured value of a signal in one arm, production or candidate.

    Attributes:
        units: number of units (users, conversations or single requests) with data.
        value: mean share over the units, or 95th percentile in seconds. None if there are no units.
        low, high: anytime-valid limits of the 95th percentile; None if they are unknown or the signal is a share.
    """

    units: int
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Loss:
    """How much worse the candidate is than production, with anytime-valid limits.

    Attributes:
        value: difference of shares, or ratio of 95th percentiles, averaged over blocks.
        low: lower limit of the loss. The probability that the limit is ever too high is at most the allowed probability
            of a wrong rollback.
        high: upper limit of the loss. The probability that the limit is ever too low is at most the allowed probability
            of wrongly advancing.
    """

    value: float
    low: float
    high: float


@dataclass(slots=True)
class _Total:
    """Number and sum of one arm's observations in complete blocks."""

    units: int = 0
    sum: float = 0.0

    def add(self, values: list[float]) -> None:
        self.units += len(values)
        self.sum += sum(values)


class ShareComparison:
    """Compares a share, such as the share of failed requests, between candidate and production.

    Args:
        margin: largest allowed difference, at least 0 and below 1.
    """

    def __init__(self, margin: float, budget: Budget) -> None:
        self.margin = margin
        self._budget = budget
        self._blocks = Blocks()
        self._evidence = Evidence(margin)
        self._differences = Counter[float]()
        self._totals = {arm: _Total() for arm in Arm}

    def add(self, arm: Arm, share: float) -> None:
        """Add the value of the compared share for one unit (a user, conversation or single request)."""
        if block := self._blocks.add(arm, share):
            self._totals[Arm.PRODUCTION].add(block.production)
            self._totals[Arm.CANDIDATE].add(block.candidate)
            difference = block.difference
            self._evidence.add(difference)
            self._differences[difference] += 1

    def outcome(self) -> GateOutcome:
        return self._evidence.outcome(self._budget)

    def units(self, arm: Arm) -> int:
        """Return how many units (users, conversations or single requests) of an arm have data."""
        return self._totals[arm].units + len(self._open(arm))

    def figure(self, arm: Arm) -> Figure:
        units = self.units(arm)
        return Figure(units, (self._totals[arm].sum + sum(self._open(arm))) / units if units else None)

    def loss(self) -> Loss | None:
        """Return the difference between the arms' shares, or None before the first block of units is complete."""
        if not self._differences:
            return None
        mean = sum(value * count for value, count in self._differences.items()) / self._differences.total()
        return Loss(mean, *difference_limits(self._differences, self._budget))

    def _open(self, arm: Arm) -> list[float]:
        return self._blocks.open.candidate if arm is Arm.CANDIDATE else self._blocks.open.production


class LatencyComparison:
    """Compares the 95th percentile of a latency between candidate and production.

    It compares two shares: candidate units above `margin` times a threshold, and production units above the threshold.
    The threshold is production's recent 95th percentile, estimated before the block to which it is applied. If
    every quantile of the candidate is at most `margin` times production's, the first share is at most the second at any
    threshold. An inaccurate threshold therefore reduces statistical power, but does not make wrong proofs more
    probable. The confidence limits of the ratio of the two percentiles are found by replacing `margin` with other
    ratios.

    Confidence sequences of both percentiles (Howard and Ramdas 2022) need about five times as many units for the
    same decision.

    Args:
        margin: largest allowed ratio, at least 1.
    """

    def __init__(self, margin: float, budget: Budget) -> None:
        self.margin = margin
        self._budget = budget
        self._blocks = Blocks()
        self._evidence = Evidence(0.0)
        self._times = {arm: Times() for arm in Arm}
        self._recent = deque[float](maxlen=_MAX_PRODUCTION)  # of production
        self._threshold: float | None = None
        self._ratios = list[float]()  # of each candidate unit in a block, to the threshold
        self._starts = list[int]()  # place of each block's first ratio
        self._slow = list[float]()  # share of each block's production units above the threshold

    def add(self, arm: Arm, seconds: float) -> None:
        """Add the latency observed for one unit (a user, conversation or single request)."""
        self._times[arm].add(seconds)
        if arm is Arm.PRODUCTION:
            self._recent.append(seconds)
        if self._threshold is None:
            self._estimate()
            return
        block = self._blocks.add(arm, seconds)
        if block is None:
            return
        ratios = [time / self._threshold for time in block.candidate]
        slow = sum(time > self._threshold for time in block.production) / len(block.production)
        self._evidence.add(sum(ratio > self.margin for ratio in ratios) / len(ratios) - slow)
        self._starts.append(len(self._ratios))
        self._ratios += ratios
        self._slow.append(slow)
        self._estimate()

    def _estimate(self) -> None:
        """Set the next block's latency threshold to production's 95th percentile, if production has enough units."""
        if len(self._recent) >= _MIN_PRODUCTION:
            self._threshold = sorted(self._recent)[math.ceil(PERCENTILE * len(self._recent)) - 1]

    def outcome(self) -> GateOutcome:
        return self._evidence.outcome(self._budget)

    def units(self, arm: Arm) -> int:
        """Return how many units (users, conversations or single requests) of an arm have data."""
        return self._times[arm].count

    def figure(self, arm: Arm) -> Figure:
        times = self._times[arm]
        if not times.count:
            return Figure(0)
        return Figure(times.count, times.quantile(PERCENTILE), *times.limits(PERCENTILE, _FIGURE_ERROR))

    def loss(self) -> Loss | None:
        """Return the ratio of the candidate's 95th-percentile latency to production's, from 0.01 to 100.

        The result is None before the first block of units is complete.
        """
        if not self._slow:
            return None
        ratios, slow = np.array(self._ratios, dtype=np.float64), np.array(self._slow, dtype=np.float64)
        starts = np.array(self._starts, dtype=np.intp)
        sizes = np.diff(np.append(starts, len(ratios)))

        def differences(ratio: float) -> Floats:
            above: Floats = np.add.reduceat((ratios > ratio).astype(float), starts) / sizes
            return above - slow

        low, high = limits(
            lambda ratio: wealth(proof(differences(ratio), 0.0)),
            lambda ratio: wealth(exclusion(differences(ratio), 0.0)),
            self._budget,
            _RATIOS,
        )
        return Loss(last_refuted(lambda ratio: float(differences(ratio).mean()) > 0, *_RATIOS), low, high)
