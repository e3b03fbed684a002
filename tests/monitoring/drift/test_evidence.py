"""False alarms are as rare as promised, and an alarm begins and ends with the change."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter

from monitoring.drift import evidence
from monitoring.drift.evidence import HIT, MISS, NOT_THERE, Event, Evidence, FeatureAlarm, FeatureState, Hits

STATES = TypeAdapter(dict[str, FeatureState])
THRESHOLD = 50.0
"""Small, so that false alarms come often enough to be counted."""
BOUND = 0.1
STREAMS = 100
CHANGE_AFTER = 500

hit_or_not = st.sampled_from([HIT, MISS, NOT_THERE])
streams = st.lists(st.tuples(hit_or_not, hit_or_not, hit_or_not), max_size=150)


class Watched:
    """Several features that are watched together; hits may be given in pieces."""

    def __init__(
        self,
        features: Sequence[str] = ("one", "one", "other"),
        bounds: Sequence[float] = (BOUND, 0.5, BOUND),
        *,
        dependence: float = 1.0,
        threshold: float = THRESHOLD,
        states: Mapping[str, FeatureState] | None = None,
        position: int = 0,
    ) -> None:
        # Each feature is a stream for itself here, so its weights add up to 1.
        weights = np.array([1 / list(features).count(name) for name in features])
        self.evidence = Evidence(features, weights, threshold, states or {})
        self._bounds, self._dependence = np.array(bounds), dependence
        self.position = position
        self.events: list[Event] = []

    def add(self, *items: Sequence[int]) -> "Watched":
        """Take items, a hit or not for each bet."""
        for item in items:
            self.position += 1
            hits = np.array(item, dtype=np.int8)
            self.events += self.evidence.add(self.position, hits, self._bounds, self._dependence)
        return self

    def lasting(self) -> dict[str, FeatureAlarm]:
        """Return the alarms that last, by feature."""
        return {name: state.alarm for name, state in self.evidence.states().items() if state.alarm}


def one_bet(**options: float) -> Watched:
    return Watched(["one"], [BOUND], **options)  # type: ignore[arg-type]


def nested(chances: NDArray[np.float64], shares: Sequence[float]) -> Hits:
    """Return hits in sets of these shares, the smaller ones inside the larger ones, streams by sets."""
    return np.where(chances[:, None] < np.array(shares), HIT, MISS).astype(np.int8)


def false_alarm_rate(
    bounds: Sequence[float],
    shares: Sequence[float],
    *,
    run: int = 1,
    dependence: float = 1.0,
    items: int = 800,
    seed: int = 1,
) -> float:
    """Return the alarms that are called per item in which no alarm lasts.

    Args:
        bounds: of the sets of a stream.
        shares: of the items that are in each.
        run: successive items that are identical.
    """
    features = [f"stream {number}" for number in range(STREAMS) for _ in bounds]
    watched = Watched(features, [*bounds] * STREAMS, dependence=dependence)
    generator, chances = np.random.default_rng(seed), np.zeros(STREAMS)
    quiet = lasting = 0
    for place in range(items):
        if place % run == 0:
            chances = generator.random(STREAMS)
        quiet += STREAMS - lasting
        watched.add(nested(chances, shares).ravel().tolist())
        lasting = sum(1 if event.alarm else -1 for event in watched.events)
    return sum(event.alarm is not None for event in watched.events) / quiet


def first_alarms(
    before: float, after: float, bound: float, *, run: int = 1, items: int = 1500, features: int = 12
) -> tuple[list[FeatureAlarm], list[Event]]:
    """Return the first alarm of each feature after a change, and all events."""
    names = [f"feature {number}" for number in range(features)]
    watched = Watched(names, [bound] * features, dependence=run, threshold=1e5)
    generator, chances = np.random.default_rng(1), np.zeros(features)
    for place in range(items):
        if place % run == 0:
            chances = generator.random(features)
        watched.add(nested(chances, [before if place < CHANGE_AFTER else after])[:, 0].tolist())
    first = {event.feature: event.alarm for event in reversed(watched.events) if event.alarm}
    return list(first.values()), watched.events


@pytest.mark.parametrize("run", [1, 5, 20])
@pytest.mark.parametrize(("before", "bound", "after"), [(0.02, 0.06, 0.6), (0.25, 0.5, 0.95)])
def test_an_alarm_names_about_the_item_with_which_the_change_began(
    before: float, bound: float, after: float, run: int
) -> None:
    alarms, _ = first_alarms(before, after, bound, run=run)
    errors = [abs(alarm.since - CHANGE_AFTER - 1) for alarm in alarms]
    assert len(alarms) == 12
    assert np.median(errors) <= 3 + run


@pytest.mark.parametrize("run", [1, 5, 20])
def test_an_alarm_is_called_once_and_lasts_when_the_change_lasts(run: int) -> None:
    _, events = first_alarms(0.02, 0.5, 0.06, run=run, items=3000)
    assert len(events) == 12
