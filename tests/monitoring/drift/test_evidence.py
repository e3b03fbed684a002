"""Tests that false alarms stay within the budget, and that an alarm starts and ends with the change."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from monitoring.drift import evidence
from monitoring.drift.evidence import HIT, MISS, NOT_THERE, STAKES, Event, Evidence, FeatureAlarm, FeatureState, Hits
from svc.drift_reference.sample import Floats

pytestmark = pytest.mark.slow

STATES = TypeAdapter(dict[str, FeatureState])
THRESHOLD = 50.0
"""Evidence threshold, low enough for false alarms to be frequent enough to count."""
BOUND = 0.1
STREAMS = 100
CHANGE_AFTER = 500

hit_or_not = st.sampled_from([HIT, MISS, NOT_THERE])
streams = st.lists(st.tuples(hit_or_not, hit_or_not, hit_or_not), max_size=150)


class Watched:
    """Several features watched together. Their hits may be added in pieces."""

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
        # Each feature is a separate stream here, so its weights sum to 1.
        weights = np.array([1 / list(features).count(name) for name in features])
        self.evidence = Evidence(features, weights, threshold, states or {})
        self._bounds, self._dependence = np.array(bounds), dependence
        self.position = position
        self.events: list[Event] = []

    def add(self, *items: Sequence[int]) -> "Watched":
        """Add items, each with one hit or miss per bet."""
        for item in items:
            self.position += 1
            hits = np.array(item, dtype=np.int8)
            self.events += self.evidence.add(self.position, hits, self._bounds, self._dependence)
        return self

    def lasting(self) -> dict[str, FeatureAlarm]:
        """Return the active alarms, keyed by feature."""
        return {name: state.alarm for name, state in self.evidence.states().items() if state.alarm}


def one_bet(alarm: FeatureAlarm | None = None, *, dependence: float = 1.0) -> Watched:
    """Return a single feature with one bet.

    Args:
        alarm: alarm that is already active.
    """
    if alarm is None:
        return Watched(["one"], [BOUND], dependence=dependence)
    states = {"one": FeatureState((1.0,) * len(STAKES), (0,) * len(STAKES), alarm)}
    return Watched(["one"], [BOUND], dependence=dependence, threshold=1e5, states=states, position=alarm.called)


def nested(chances: Floats, shares: Sequence[float]) -> Hits:
    """Return hits in nested sets with the given shares, with shape (streams x sets)."""
    return np.where(chances[:, None] < np.array(shares), HIT, MISS).astype(np.int8)


def false_alarm_rate(
    bounds: Sequence[float],
    shares: Sequence[float],
    *,
    run: int = 1,
    dependence: float = 1.0,
    items: int = 500,
    seed: int = 1,
) -> float:
    """Return the number of alarms per item observed without an active alarm.

    Args:
        bounds: bounds of a stream's sets.
        shares: share of items in each set.
        run: number of consecutive identical items.
    """
    features = [f"stream {number}" for number in range(STREAMS) for _ in bounds]
    watched = Watched(features, [*bounds] * STREAMS, dependence=dependence)
    generator = np.random.default_rng(seed)
    chances: Floats = np.zeros(STREAMS)
    quiet = lasting = 0
    for place in range(items):
        if place % run == 0:
            chances = generator.random(STREAMS)
        quiet += STREAMS - lasting
        watched.add(nested(chances, shares).ravel().tolist())
        lasting = sum(1 if event.alarm else -1 for event in watched.events)
    return sum(event.alarm is not None for event in watched.events) / quiet


def first_alarms(
    before: float, after: float, bound: float, *, run: int = 1, items: int = 1200, features: int = 12
) -> tuple[list[FeatureAlarm], list[Event]]:
    """Return the first alarm of each feature after a change, plus all events."""
    names = [f"feature {number}" for number in range(features)]
    watched = Watched(names, [bound] * features, dependence=run, threshold=1e5)
    generator = np.random.default_rng(1)
    chances: Floats = np.zeros(features)
    for place in range(items):
        if place % run == 0:
            chances = generator.random(features)
        watched.add(nested(chances, [before if place < CHANGE_AFTER else after])[:, 0].tolist())
    first = {event.feature: event.alarm for event in reversed(watched.events) if event.alarm}
    return list(first.values()), watched.events


@pytest.mark.parametrize(
    ("before", "bound", "after", "run"), [(0.02, 0.06, 0.6, 1), (0.02, 0.06, 0.6, 20), (0.25, 0.5, 0.95, 5)]
)
def test_alarm_includes_an_estimate_of_when_the_change_started(
    before: float, bound: float, after: float, run: int
) -> None:
    alarms, _ = first_alarms(before, after, bound, run=run)
    errors = [abs(alarm.since - CHANGE_AFTER - 1) for alarm in alarms]
    assert len(alarms) == 12
    assert np.median(errors) <= 3 + run


@pytest.mark.parametrize(("before", "bound", "after"), [(0.02, 0.05, 0.1), (0.05, 0.11, 0.16), (0.15, 0.33, 0.45)])
def test_alarm_starts_even_if_the_hit_rate_is_only_slightly_above_its_bound(
    before: float, bound: float, after: float
) -> None:
    alarms, _ = first_alarms(before, after, bound, items=8_000)
    assert len(alarms) == 12
    assert np.median([alarm.called - CHANGE_AFTER for alarm in alarms]) < 1_000


@pytest.mark.parametrize("run", [1, 20])
def test_alarm_starts_once_and_stays_active_while_the_change_continues(run: int) -> None:
    _, events = first_alarms(0.02, 0.5, 0.06, run=run, items=2500)
    assert len(events) == 12


@pytest.mark.parametrize(
    ("bounds", "stakes"),
    [
        ((0.1,), (0.35, 0.7)),
        ((0.5,), (0.35, 0.7)),
        ((0.02, 0.1, 0.5), (0.35, 0.7)),
        ((0.02, 0.1, 0.5), (0.1, 0.95)),
        ((0.1,), (0.35,)),
        ((0.5,), (0.7,)),
    ],
)
def test_false_alarm_rate_stays_within_its_limit_if_hit_rates_equal_their_bounds(
    monkeypatch: pytest.MonkeyPatch, bounds: tuple[float, ...], stakes: tuple[float, ...]
) -> None:
    monkeypatch.setattr(evidence, "STAKES", np.array(stakes))
    rate = false_alarm_rate(bounds, bounds, items=400)
    assert 0 < rate <= 1 / THRESHOLD


def test_false_alarms_are_rarer_if_the_hit_rate_is_below_its_bound_than_if_it_equals_its_bound() -> None:
    at, below = false_alarm_rate([0.5], [0.5]), false_alarm_rate([0.5], [0.35])
    assert below < at / 3


def test_runs_of_identical_items_cause_few_false_alarms_if_the_dependence_distance_equals_the_run_length() -> None:
    assert false_alarm_rate([0.1, 0.5], [0.1, 0.5], run=5, dependence=5.0) <= 1 / THRESHOLD


def test_treating_consecutive_identical_items_as_independent_causes_too_many_false_alarms() -> None:
    """Control without which the test above could not fail."""
    assert false_alarm_rate([0.1, 0.5], [0.1, 0.5], run=5) > 1 / THRESHOLD


@given(streams, st.integers(0, 150), st.integers(1, 40))
def test_items_without_a_value_leave_the_drift_evidence_unchanged(
    items: list[tuple[int, ...]], place: int, count: int
) -> None:
    nothing = [(NOT_THERE,) * 3] * count
    plain, with_gap = Watched().add(*items), Watched().add(*items[:place], *nothing, *items[place:])
    assert with_gap.evidence.strengths() == plain.evidence.strengths()
    assert [(event.feature, event.alarm is None) for event in with_gap.events] == [
        (event.feature, event.alarm is None) for event in plain.events
    ]


@given(streams)
def test_evidence_for_one_feature_is_independent_of_other_features(items: list[tuple[int, ...]]) -> None:
    together, alone = Watched(), Watched(["other"], [BOUND])
    for item in items:
        together.add(item)
        alone.add(item[2:])
    assert [event for event in together.events if event.feature == "other"] == alone.events
    assert together.evidence.states()["other"] == alone.evidence.states()["other"]


def test_features_that_change_at_different_times_each_get_an_alarm() -> None:
    watched = Watched().add(*[(HIT, HIT, MISS)] * 20, *[(HIT, HIT, HIT)] * 20)
    assert [(event.feature, event.position > 20) for event in watched.events] == [("one", False), ("other", True)]
    assert set(watched.lasting()) == {"one", "other"}


def test_alarm_ends_after_its_patience_period_and_can_start_again() -> None:
    watched = one_bet().add(*[(MISS,)] * 200, *[(HIT,)] * 100, *[(MISS,)] * 300, *[(HIT,)] * 10)
    began, ended, again = watched.events
    assert began.alarm and again.alarm and ended.alarm is None
    assert 200 < began.position <= 205 and 495 <= ended.position <= 500 and 600 < again.position <= 605
    assert (began.alarm.since, again.alarm.since) == (201, 601)


def test_alarm_stays_active_if_drift_pauses_for_less_than_the_patience_period() -> None:
    watched = one_bet().add(*[(MISS,)] * 200)
    for _ in range(10):
        watched.add(*[(HIT,)] * 20, *[(MISS,)] * 20)
    assert len(watched.events) == 1
    assert watched.lasting()


def test_alarm_takes_longer_to_end_if_the_change_took_longer_to_detect() -> None:
    watched = one_bet(FeatureAlarm(since=101, called=301)).add(*[(MISS,)] * 799)
    assert watched.events == []
    assert [event.position for event in watched.add((MISS,)).events] == [1101]


def test_alarm_ends_after_at_most_1000_items_without_further_evidence() -> None:
    watched = one_bet(FeatureAlarm(since=1, called=9_001), dependence=64.0)
    assert [event.position for event in watched.add(*[(MISS,)] * 1_100).events] == [10_001]


@given(streams, st.lists(st.integers(0, 150), max_size=4), st.sampled_from([1.0, 3.7]))
def test_restoring_state_from_json_between_chunks_does_not_change_the_result(
    items: list[tuple[int, ...]], cuts: list[int], dependence: float
) -> None:
    whole = Watched(dependence=dependence).add(*items)
    edges = [0, *sorted(min(cut, len(items)) for cut in cuts), len(items)]
    states: Mapping[str, FeatureState] = {}
    events: list[Event] = []
    for start, stop in pairwise(edges):
        part = Watched(dependence=dependence, states=states, position=start).add(*items[start:stop])
        states = STATES.validate_json(STATES.dump_json(part.evidence.states()))
        events += part.events
    assert events == whole.events
    assert states == whole.evidence.states()


def test_drift_evidence_is_reset_only_for_features_whose_bets_have_changed() -> None:
    states = Watched().add(*[(HIT, HIT, HIT)] * 30).evidence.states()
    changed = Watched(["one", "other"], [BOUND, BOUND], states=states)
    assert changed.evidence.strengths() == {"one": 0.0, "other": 1.0}


@given(streams)
def test_alarm_strength_stays_between_0_and_1_and_reaches_1_only_during_alarms(items: list[tuple[int, ...]]) -> None:
    watched = Watched()
    for item in items:
        strengths = watched.add(item).evidence.strengths()
        assert all(0 <= strength <= 1 for strength in strengths.values())
        assert {name for name, strength in strengths.items() if strength == 1} == set(watched.lasting())


@given(streams)
def test_alarm_start_and_end_events_alternate_for_each_feature(items: list[tuple[int, ...]]) -> None:
    watched = Watched().add(*items)
    for name in ("one", "other"):
        began = [event.alarm is not None for event in watched.events if event.feature == name]
        assert began == [number % 2 == 0 for number in range(len(began))]


def test_estimated_start_of_a_change_is_never_after_its_alarm() -> None:
    generator = np.random.default_rng(1)
    watched = Watched().add(*np.where(generator.random((4000, 3)) < 0.15, HIT, MISS).tolist())
    alarms = [event.alarm for event in watched.events if event.alarm]
    assert alarms
    assert all(1 <= alarm.since <= alarm.called for alarm in alarms)


def test_drift_evidence_without_any_bets_produces_no_events() -> None:
    nothing = Evidence([], np.zeros(0), THRESHOLD, {})
    assert nothing.add(1, np.zeros(0, np.int8), np.zeros(0), 1.0) == []
    assert (nothing.states(), nothing.strengths()) == ({}, {})


def test_alarm_start_is_the_first_checked_item_if_the_change_happened_before_it() -> None:
    """An example is a change that was accepted: the positions of the stream continue."""
    watched = Watched(["one"], [BOUND], position=5_000).add(*[(HIT,)] * 20)
    assert [event.alarm.since for event in watched.events if event.alarm] == [5_001]
