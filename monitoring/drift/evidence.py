"""Collects evidence that a stream's features have changed, by betting, and defines the rule for raising an alarm.

A bet is placed on a set of values of a feature, such as "shorter than 99% of the reference". As long as
the probability of a value being in the set does not exceed the bet's bound, the feature counts as unchanged. The bet
stakes a fraction l of its wealth on each item, and its wealth is multiplied by the factor
e = 1 - l + l * [item in set] / bound, which is at most 1 on average while nothing has changed. A new bet with wealth
1 starts at each item, and the total wealth of all bets, M <- e * (1 + M), is the statistic: the Shiryaev-Roberts
e-detector (Shin, Ramdas and Rinaldo 2022, "E-detectors"). While nothing has changed, a weighted sum of such statistics
exceeds A at most once in A items on average, regardless of how the bets depend on each other. Frequent checks
therefore add no false alarms, and no windows are needed.

For dependent items, all factors are raised to the power 1 / L. The limit on false alarms then holds for streams whose
items are independent beyond a distance of L (by Hoelder's inequality: the product of L dependent factors to
the power 1 / L has a mean of at most 1).

This module is pure: it has no store and no clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svc.drift_reference.sample import Floats

STAKES = np.array([0.1, 0.35, 0.7])
"""Fractions of a bet's wealth staked on each item. Each bet is placed once with each stake. The largest stake detects
a gross change within four items. If the share of items in a bet's set rises to 1.5 times the bet's bound, the smallest
stake detects this within about 2,000 items."""
_MIN_PATIENCE, _MAX_PATIENCE = 200, 1_000
_LASTING = 20.0
"""The change counts as continuing if the statistic reaches `_LASTING` times `FeatureAlarm.patience`. Without a change,
this happens within `FeatureAlarm.patience` items in fewer than one in 20 alarms."""

Hits = NDArray[np.int8]
HIT, MISS, NOT_THERE = 1, 0, -1
"""Codes for an item that is in a bet's set, is not in the set, or has no value for the feature."""


@dataclass(frozen=True, slots=True)
class FeatureAlarm:
    """An active alarm for one feature.

    Attributes:
        since: estimated position at which the change began.
        called: position at which the alarm was raised.
        quiet: number of items since the last sign of the change.
    """

    since: int
    called: int
    quiet: int = 0

    def patience(self, dependence: float) -> float:
        """Return how many items in a row must show no sign of the change before the alarm ends.

        This is four times the number of items between the change and the alarm, within limits.

        Dependent items carry less information, so the lower limit grows with the dependence.
        """
        return min(max(_MIN_PATIENCE * dependence, 4 * (self.called - self.since)), _MAX_PATIENCE)


@dataclass(frozen=True, slots=True)
class FeatureState:
    """State of the bets on one feature. Each bet is placed once with each stake in `STAKES`.

    Attributes:
        money: the statistic (total wealth) of each bet with each stake. During an alarm, all bets on the feature start
            from scratch each time they show that the change continues.
        began: for each statistic, the position in the stream of the newest item at which the value was still normal,
            that is, no higher than expected without a change.
    """

    money: tuple[float, ...]
    began: tuple[int, ...]
    alarm: FeatureAlarm | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """The start or end of an alarm for one feature.

    Attributes:
        position: position of the item that started or ended the alarm.
        alarm: the alarm that started, or None if an alarm ended.
    """

    position: int
    feature: str
    alarm: FeatureAlarm | None


class Evidence:
    """Tracks the statistics of all bets on a stream, and starts and ends alarms.

    Args:
        features: each bet's feature.
        weights: each bet's weight; the sum over all bets on the stream is at most 1.
        threshold: weighted sum of a feature's statistics that starts an alarm. While nothing has changed, at
            most one alarm is expected in this number of items.
        states: earlier states keyed by feature, as returned by `states()`. Features whose bets have changed
            start from scratch.
    """

    def __init__(
        self, features: Sequence[str], weights: Floats, threshold: float, states: Mapping[str, FeatureState]
    ) -> None:
        self.names = tuple(dict.fromkeys(features))
        self._feature = np.array([self.names.index(name) for name in features], dtype=np.intp)
        self._weights = np.repeat(weights[:, None] / len(STAKES), len(STAKES), axis=1)
        self._threshold = threshold
        self._money = np.zeros(self._weights.shape)
        self._began = np.zeros(self._weights.shape, dtype=np.int64)
        # A statistic below this value times the dependence L is ordinary, as without a change: misses alone reduce it
        # to 1 / stake - 1, and with factors to the power 1 / L to less than -L / log(1 - stake).
        self._ordinary = np.maximum(2.5, -1.1 / np.log1p(-STAKES))
        self._alarms: dict[int, FeatureAlarm] = {}
        for number, name in enumerate(self.names):
            state, bets = states.get(name), self._feature == number
            if state is not None and len(state.money) == bets.sum() * len(STAKES):
                self._money[bets] = np.reshape(state.money, (-1, len(STAKES)))
                self._began[bets] = np.reshape(state.began, (-1, len(STAKES)))
                if state.alarm:
                    self._alarms[number] = state.alarm

    def add(self, position: int, hits: Hits, bounds: Floats, dependence: float) -> list[Event]:
        """Process the next item of the stream, and return the alarms that it starts or ends.

        Args:
            hits: `HIT`, `MISS` or `NOT_THERE` for each bet; `NOT_THERE` counts as no evidence.
            bounds: each bet's bound, above 0.
            dependence: distance within which items depend on each other, called L in the module docstring.
        """
        there = hits != NOT_THERE
        self._began[self._money == 0] = position - 1  # no bet was made yet
        dependence = max(1.0, dependence)
        factors = (1 - STAKES + STAKES * ((hits == HIT) / bounds)[:, None]) ** (1 / dependence)
        self._money = np.where(there[:, None], factors * (1 + self._money), self._money)
        ordinary = self._money < self._ordinary * dependence
        self._began[ordinary] = position
        sums = self._sums()
        called = set(np.flatnonzero(sums >= self._threshold).tolist()) - self._alarms.keys()
        events = [self._judge_alarm(number, position, sums, dependence) for number in tuple(self._alarms)]
        events += [self._call(number, position) for number in sorted(called)]
        return [event for event in events if event]

    @property
    def in_alarm(self) -> bool:
        """Return whether any feature currently has an alarm."""
        return bool(self._alarms)

    def states(self) -> dict[str, FeatureState]:
        """Return the state of each feature, keyed by its name, for creating the next `Evidence`."""
        return {
            name: FeatureState(
                tuple(self._money[self._feature == number].ravel().tolist()),
                tuple(self._began[self._feature == number].ravel().tolist()),
                self._alarms.get(number),
            )
            for number, name in enumerate(self.names)
        }

    def strengths(self) -> dict[str, float]:
        """Return how strong the evidence for a change of each feature is, on a log scale from 0 (none) to 1 (alarm)."""
        strengths = np.minimum(np.log1p(self._sums()) / np.log1p(self._threshold), 1.0)
        return {
            name: 1.0 if number in self._alarms else float(strengths[number]) for number, name in enumerate(self.names)
        }

    def _sums(self) -> Floats:
        sums = np.zeros(len(self.names))
        np.add.at(sums, self._feature, (self._weights * self._money).sum(axis=1))
        return sums

    def _call(self, number: int, position: int) -> Event:
        bets = self._feature == number
        strongest = int((self._weights[bets] * self._money[bets]).argmax())
        alarm = FeatureAlarm(since=int(self._began[bets].ravel()[strongest]) + 1, called=position)
        self._set(number, alarm)
        return Event(position, self.names[number], alarm)

    def _judge_alarm(self, number: int, position: int, sums: Floats, dependence: float) -> Event | None:
        """Update a feature's alarm with one more item, and return an event if the item ends the alarm."""
        bets, alarm = self._feature == number, self._alarms[number]
        patience = alarm.patience(dependence)
        if sums[number] / self._weights[bets].sum() >= _LASTING * patience:
            self._set(number, FeatureAlarm(alarm.since, alarm.called))
            return None
        alarm = FeatureAlarm(alarm.since, alarm.called, alarm.quiet + 1)
        if alarm.quiet < patience:
            self._alarms[number] = alarm
            return None
        self._set(number, None)
        return Event(position, self.names[number], None)

    def _set(self, number: int, alarm: FeatureAlarm | None) -> None:
        """Set or clear a feature's alarm, and start all bets on the feature from scratch."""
        self._money[self._feature == number] = 0.0
        if alarm:
            self._alarms[number] = alarm
        else:
            self._alarms.pop(number, None)
