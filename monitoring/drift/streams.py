"""The streams of a version's traffic: what is new in each, and what it looks like as a sample.

A prompt that comes again within the newest hundred counts once: a health check or a retry says nothing about drift, and
the tests take requests to be independent.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import numpy as np
from sqlalchemy import Engine as Store

from monitoring.drift.detector import Detector, Test, Watch
from monitoring.drift.report import Line, compare
from monitoring.drift.signals import RatingFeature, answer_tests, input_tests, rating_tests
from monitoring.drift.two_sample.alpha_spending import SIGNAL_SHARES, WINDOWS, Signal
from svc.drift_reference.reference import Reference, read_prompt
from svc.drift_reference.sample import NO, RECENT, YES, Sample, evenly_picked, first_of_recent
from svc.store.answered import (
    AnsweredRequest,
    RatedAnswer,
    answered_ids,
    newest_id,
    read_answered,
    read_earlier_ratings,
    read_ratings,
)
from svc.version import Target

MEMORY = max(RECENT, *(window.size for window in WINDOWS))
_MOST_WAITING = 20_000
"""Rows since the last check, of which some are picked; a check after days of silence looks at no more."""
_FEWEST_RATINGS = 100
"""To compare with: as many as the largest window has."""
_MOST_RATINGS = 1_000


@dataclass(frozen=True, slots=True)
class StreamState:
    """What the next check of a stream starts from.

    Attributes:
        cursor: what was seen: a row's id, of ratings microseconds since 1970.
        memory: ids of the newest items, which windows reach back to.
        allowance: items that may be looked at now.
        refilled_at: when the allowance was reckoned.
        base: of ratings, what they are compared with: (bad, corrected), fixed once it is there.
    """

    cursor: int = 0
    memory: tuple[int, ...] = ()
    watch: Watch = field(default_factory=Watch)
    allowance: float = 0.0
    refilled_at: datetime | None = None
    base: tuple[tuple[bool, bool], ...] = ()


@dataclass(frozen=True, slots=True)
class Items:
    """Items of a stream in their order.

    Attributes:
        ids: of their rows.
        request_ids: what clients know them by.
        times: when each began, or was rated.
        new: how many at the end are new.
        cursor: of the next state.
    """

    ids: tuple[int, ...]
    request_ids: tuple[str, ...]
    times: tuple[datetime, ...]
    sample: Sample
    new: int
    cursor: int


class Stream(Protocol):
    """One signal's items.

    Attributes:
        signal: which.
        off: why it cannot be watched; empty where it can.
        reference: what items are compared with; None while there is none.
        part: of the reference that a window may be as large as.
    """

    @property
    def signal(self) -> Signal: ...

    @property
    def off(self) -> str: ...

    @property
    def reference(self) -> Sample | None: ...

    @property
    def part(self) -> float: ...

    def tests(self, reference: Sample) -> Sequence[Test]:
        """Its tests against the reference."""
        ...

    def read(self, state: StreamState, most: int) -> Items:
        """The newest items, those in memory before them; at most so many new ones."""
        ...


@dataclass(frozen=True)
class StreamComparison:
    """A stream's reference, and the tests against it, made once for a check."""

    reference: Sample
    tests: Sequence[Test]
    detector: Detector

    @classmethod
    def of(cls, stream: Stream, reference: Sample, target: Target) -> "StreamComparison":
        """The comparison of a stream of one version with its reference."""
        tests = stream.tests(reference)
        seed = (target.version.number, list(Signal).index(stream.signal))
        share = SIGNAL_SHARES[stream.signal]
        return cls(reference, tests, Detector(tests, reference.size, share, part=stream.part, stream=seed))

    def lines(self, live: Sample, position: int) -> tuple[Line, ...]:
        """What a window looks like, for people."""
        return compare(self.tests, self.reference, live, (position,))


@dataclass(frozen=True)
class PromptStream:
    """Prompts that are kept."""

    store: Store
    target: Target
    held: Reference
    content_kept: bool | None
    signal = Signal.INPUT
    part = 0.5

    @property
    def off(self) -> str:
        """Without content there is nothing to compare."""
        if self.reference is None:
            return self.held.missing
        if self.content_kept is False:
            return "no prompts are kept: set request_log.content_share, and start the server again"
        return ""

    @property
    def reference(self) -> Sample | None:
        """Those of the examples that the version was made from."""
        return self.held.prompts

    def tests(self, reference: Sample) -> Sequence[Test]:
        """Classifier and readable features."""
        return input_tests(reference)

    def read(self, state: StreamState, most: int) -> Items:
        """Rows whose content is kept."""
        rows, new, cursor = _read_rows(self.store, self.target, state, most, with_content=True)
        return _items(rows, self.held.live_prompts(rows), new, cursor)


@dataclass(frozen=True)
class AnswerStream:
    """Answers: texts where they are kept, lengths and ends of all where none is."""

    store: Store
    target: Target
    held: Reference
    content_kept: bool | None
    signal = Signal.OUTPUT
    part = 0.5

    @property
    def off(self) -> str:
        """An adapter has no registered answers."""
        return "" if self.reference is not None else self.held.missing

    @property
    def reference(self) -> Sample | None:
        """The answers to the held-out prompts."""
        return self.held.answers

    def tests(self, reference: Sample) -> Sequence[Test]:
        """Readable features."""
        return answer_tests(reference)

    def read(self, state: StreamState, most: int) -> Items:
        """Rows whose content is kept; all rows where none is."""
        rows, new, cursor = _read_rows(self.store, self.target, state, most, with_content=bool(self.content_kept))
        return _items(rows, self.held.live_answers(rows), new, cursor)


class RatingStream:
    """Ratings, against those of the versions before, or where there are few of those, against its own first ones."""

    signal = Signal.PEOPLE
    off = ""
    part = 1.0
    """Ratings are few; and one share is known well enough from a reference of the window's size."""

    def __init__(self, store: Store, target: Target, state: StreamState, now: datetime) -> None:
        self._ratings = read_ratings(store, target, newest=_MOST_RATINGS)
        # Not beyond now: a clock that ran ahead for a while would make all later ratings old.
        self._newest = min(_micros(now), max((_micros(rating.given_at) for rating in self._ratings), default=0))
        self.base = state.base
        if self.base:
            return
        earlier = read_earlier_ratings(store, target, newest=_MOST_RATINGS)
        if len(earlier) >= _FEWEST_RATINGS:
            self.base = _pairs(earlier)
        elif len(self._ratings) >= _FEWEST_RATINGS:
            # From here on they are the reference, and no part of the stream.
            self.base, self._ratings = _pairs(self._ratings[:_FEWEST_RATINGS]), self._ratings[_FEWEST_RATINGS:]

    @property
    def reference(self) -> Sample | None:
        """Earlier ratings."""
        return _rating_sample(self.base) if self.base else None

    def tests(self, reference: Sample) -> Sequence[Test]:
        """Of both shares."""
        return rating_tests(reference)

    def read(self, state: StreamState, most: int) -> Items:
        """Ratings given since."""
        known = set(state.memory)
        before = [rating for rating in self._ratings if rating.id in known]
        new = [r for r in self._ratings if r.id not in known and _micros(r.given_at) > state.cursor]
        shown = [*before, *new[-most:]] if most else before
        return Items(
            ids=tuple(rating.id for rating in shown),
            request_ids=tuple(rating.request_id for rating in shown),
            times=tuple(rating.given_at for rating in shown),
            sample=_rating_sample(_pairs(shown)),
            new=len(shown) - len(before),
            cursor=max(state.cursor, self._newest),
        )


def _read_rows(
    store: Store, target: Target, state: StreamState, most: int, *, with_content: bool
) -> tuple[list[AnsweredRequest], int, int]:
    """The rows of memory and the new ones, how many are new, and the next cursor."""
    # Ids begin anew when all rows were forgotten; then those of memory are others now.
    cursor, memory = (state.cursor, state.memory) if newest_id(store) >= state.cursor else (0, ())
    waiting = answered_ids(store, target, after=cursor, newest=_MOST_WAITING, with_content=with_content)
    before = read_answered(store, target, memory)
    found = read_answered(store, target, evenly_picked(waiting, most))
    new = [found[place] for place in first_of_recent([_key(row) for row in found], [_key(row) for row in before])]
    return [*before, *new], len(new), waiting[-1] if waiting else cursor


def _key(row: AnsweredRequest) -> Hashable:
    """What makes two requests one; those whose prompts are not kept are all different."""
    return row.id if row.prompt is None else read_prompt(row.prompt)


def _items(rows: Sequence[AnsweredRequest], sample: Sample, new: int, cursor: int) -> Items:
    return Items(
        ids=tuple(row.id for row in rows),
        request_ids=tuple(row.request_id for row in rows),
        times=tuple(row.started_at for row in rows),
        sample=sample,
        new=new,
        cursor=cursor,
    )


def _pairs(ratings: Iterable[RatedAnswer]) -> tuple[tuple[bool, bool], ...]:
    return tuple((rating.bad, rating.corrected) for rating in ratings)


def _rating_sample(pairs: Sequence[tuple[bool, bool]]) -> Sample:
    columns = {RatingFeature.BAD: [bad for bad, _ in pairs], RatingFeature.CORRECTED: [fixed for _, fixed in pairs]}
    categories = {name.value: np.array([YES if one else NO for one in values]) for name, values in columns.items()}
    return Sample(len(pairs), {}, categories)


def _micros(time: datetime) -> int:
    return round(time.timestamp() * 1_000_000)
