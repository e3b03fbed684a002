"""Watches the drift signal `people`: compares ratings of a version's answers with those of earlier versions' answers.

Only a person's first rating of each day counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from functools import partial

import numpy as np
from sqlalchemy import Engine as Store

from monitoring.drift.alarms import AlarmBook
from monitoring.drift.bets import Bet, hit_table, upper_limit
from monitoring.drift.budget import FALSE_ALARMS_PER_REQUEST, SIGNAL_SHARES, Signal
from monitoring.drift.evidence import Event, Evidence, FeatureState
from monitoring.drift.report import Line, SignalReport, Status, feature_line, most_moved
from svc.drift_reference.sample import NO, YES, Sample
from svc.errors import RefusedError
from svc.store.answered import RatedAnswer, read_earlier_ratings, read_ratings
from svc.version import Target

_MIN_REFERENCE = 100
_MAX_RATINGS = 1_000
_SHOWN = 100
_MIN_ACCEPTED = 50
_SURE = 2.0
"""Half width, in standard errors, of the 95% Wilson interval for the reference's share of bad ratings or corrections.
Shares up to the interval's upper limit are normal. Unlike in `feature_bets`, the limit is not multiplied by `SLACK`,
because ratings do not vary with the time of day."""


class RatingFeature(StrEnum):
    """Features computed from ratings, each shown as a row of the drift table."""

    BAD = "bad_ratings"
    CORRECTED = "corrections"


@dataclass(frozen=True, slots=True)
class RatingState:
    """State carried over from one check of ratings to the next.

    Attributes:
        cursor: time of the newest rating seen, in microseconds since 1970.
        memory: ids of the newest ratings that were compared.
        base: the reference ratings, as pairs (bad, corrected); they do not change once collected.
        position: number of ratings compared so far.
    """

    cursor: int = 0
    memory: tuple[int, ...] = ()
    base: tuple[tuple[bool, bool], ...] = ()
    position: int = 0
    features: dict[str, FeatureState] = field(default_factory=dict)


def check_ratings(
    store: Store, target: Target, state: RatingState, now: datetime, alarms: AlarmBook
) -> tuple[RatingState, SignalReport]:
    """Compare new ratings with the reference, start and end alarms, and return the new state and the report."""
    ratings = one_a_day(read_ratings(store, target, newest=_MAX_RATINGS))
    # At most the current time: otherwise a clock that once ran ahead would make all later ratings too old.
    newest = min(_micros(now), max((_micros(rating.given_at) for rating in ratings), default=0))
    base = state.base
    if not base:
        earlier = one_a_day(read_earlier_ratings(store, target, newest=_MAX_RATINGS))
        if len(earlier) >= _MIN_REFERENCE:
            base = _pairs(earlier)
        elif len(ratings) >= _MIN_REFERENCE:
            # From now on they are the reference, not part of the stream.
            base, ratings = _pairs(ratings[:_MIN_REFERENCE]), ratings[_MIN_REFERENCE:]
    if not base:
        alarms.end_all(Signal.PEOPLE, now)  # from another release, whose state could not be read
        why = f"fewer than {_MIN_REFERENCE} earlier ratings to compare with (only one per person per day counts)"
        return state, SignalReport(Signal.PEOPLE, Status.WAITING, why)
    known = set(state.memory)
    before = [rating for rating in ratings if rating.id in known]
    new = [r for r in ratings if r.id not in known and _micros(r.given_at) > state.cursor]
    return _Ratings(base, state, before, new).take(max(min(state.cursor, _micros(now)), newest), alarms, now)


def rating_sample(pairs: Sequence[tuple[bool, bool]]) -> Sample:
    """Return a drift sample built from ratings.

    Args:
        pairs: for each rating, whether it is bad and whether it includes a correction.
    """
    columns = {RatingFeature.BAD: [bad for bad, _ in pairs], RatingFeature.CORRECTED: [fixed for _, fixed in pairs]}
    categories = {name: [YES if value else NO for value in values] for name, values in columns.items()}
    return Sample.of(len(pairs), {}, categories)


def rating_bets(reference: Sample) -> list[Bet]:
    """Return two bets: that bad ratings have become more frequent, and that corrections have become more frequent.

    Improvements raise no alarm.
    """
    return [
        Bet(name, upper_limit(int((values == YES).sum()), reference.size, _SURE), partial(np.equal, YES))
        for name, values in reference.categories.items()
    ]


def one_a_day(ratings: Iterable[RatedAnswer]) -> list[RatedAnswer]:
    """Return each person's first rating per UTC day, plus all ratings whose author is unknown."""
    first, counted = [], set[tuple[str, object]]()
    for rating in ratings:
        key = rating.person, rating.given_at.date()
        if rating.person and key in counted:
            continue
        counted.add(key)
        first.append(rating)
    return first


class _Ratings:
    def __init__(
        self,
        base: tuple[tuple[bool, bool], ...],
        state: RatingState,
        before: Sequence[RatedAnswer],
        new: Sequence[RatedAnswer],
    ) -> None:
        self._base, self._state, self._new = base, state, new
        self._ratings = [*before, *new]
        self._reference, self._sample = rating_sample(base), rating_sample(_pairs(self._ratings))
        self._first = state.position - len(before)

    def take(self, cursor: int, alarms: AlarmBook, now: datetime) -> tuple[RatingState, SignalReport]:
        bets, state = rating_bets(self._reference), self._state
        weights = np.full(len(bets), SIGNAL_SHARES[Signal.PEOPLE] / len(bets))
        evidence = Evidence([bet.feature for bet in bets], weights, 1 / FALSE_ALARMS_PER_REQUEST, state.features)
        bounds, position = np.array([bet.bound for bet in bets]), state.position
        for hits in hit_table(bets, self._sample)[len(self._ratings) - len(self._new) :]:
            position += 1
            for event in evidence.add(position, hits, bounds, 1.0):
                self._note(event, alarms)
        alarms.end_forgotten(Signal.PEOPLE, evidence.states(), now)
        memory = tuple(rating.id for rating in self._ratings[-_SHOWN:])
        state = RatingState(cursor, memory, self._base, position, evidence.states())
        live = self._sample.part(max(0, len(self._ratings) - _SHOWN), len(self._ratings))
        strengths = evidence.strengths()
        lines = [feature_line(name, strengths[name], self._reference, live) for name in evidence.names]
        lasting = alarms.report(Signal.PEOPLE)
        status = Status.ALARM if lasting else Status.STEADY if position else Status.WAITING
        return state, SignalReport(
            Signal.PEOPLE,
            status,
            "" if position else "no answer has been rated since the reference ratings were collected",
            items=position,
            window=live.size,
            lines=tuple(line for line in lines if line),
            alarms=lasting,
            newest_at=self._ratings[-1].given_at if self._ratings else None,
        )

    def _note(self, event: Event, alarms: AlarmBook) -> None:
        stop = event.position - self._first
        if event.alarm is None:
            alarms.end(Signal.PEOPLE, event.feature, self._ratings[stop - 1].given_at)
            return
        start = max(0, event.alarm.since - 1 - self._first)
        live = self._sample.part(start, stop)
        places = most_moved(event.feature, self._reference, live)
        alarms.begin(
            Signal.PEOPLE,
            feature_line(event.feature, 1.0, self._reference, live) or Line(event.feature, 0.0, 1.0, "-", "-"),
            since=self._ratings[start].given_at,
            called_at=self._ratings[stop - 1].given_at,
            examples=[self._ratings[start + place].request_id for place in places],
        )


def accept_ratings(store: Store, target: Target, state: RatingState, since: datetime) -> RatingState:
    """Return a state in which later ratings are compared with those given at or after `since`.

    Raises:
        RefusedError: too few ratings have been given at or after `since`.
    """
    ratings = [r for r in one_a_day(read_ratings(store, target, newest=_MAX_RATINGS)) if r.given_at >= since]
    if len(ratings) < _MIN_ACCEPTED:
        raise RefusedError(
            f"only {len(ratings)} ratings have been submitted since the newest drift alarm began",
            expected=f"at least {_MIN_ACCEPTED} ratings; only one rating per person per day counts",
            todo=f"after enough ratings have been submitted, repeat `svc drift {target.version} --accept`",
        )
    return replace(state, base=_pairs(ratings), features={})


def _pairs(ratings: Iterable[RatedAnswer]) -> tuple[tuple[bool, bool], ...]:
    return tuple((rating.bad, rating.corrected) for rating in ratings)


def _micros(time: datetime) -> int:
    return round(time.timestamp() * 1_000_000)
