"""Simulated traffic: requests with the results that each version would give, so that all policies see the same
traffic.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

REQUESTS_PER_S = 10.0
_MEDIAN_S, _SIGMA = 0.12, 0.5
"""Time to the first token: lognormal."""
_USER_SIGMA = 0.3
_RATED = 0.2
"""Share of answers with a rating."""
_HEAVY_SHARE = 0.3
_DAY_S = 7200.0
_SWING = 0.8
_SESSION_LENGTHS = (2, 20)
_SESSION_GAP_S = 12.0
SINGLE = -1
"""Unit of a request without a user or conversation."""


class Shape(StrEnum):
    """How requests depend on each other."""

    INDEPENDENT = "independent"
    SESSIONS = "sessions of 2 to 20"
    """Each user has their own rates and speed: most users have no errors, a few have many."""
    HEAVY = "one client with 30%"
    """The client has three times as many errors as others, and times that are 1.5 times as long."""
    DAY = "day and night"
    """Load and errors swing by a factor of 9, and times by 2.7."""


@dataclass(frozen=True)
class Version:
    """Rates of a version: failed requests, invalid outputs, times relative to production, bad ratings."""

    errors: float = 0.01
    invalid: float = 0.02
    slower: float = 1.0
    bad: float = 0.2


@dataclass(frozen=True)
class Kind:
    """Properties of a kind of rollout."""

    name: str
    candidate: Version = field(default_factory=Version)
    shape: Shape = Shape.INDEPENDENT

    @property
    def equal(self) -> bool:
        return self.candidate == Version()


EQUAL = [Kind(f"equal, {shape}", shape=shape) for shape in Shape]
AT_MARGIN = [Kind("first token +20%, the margin", Version(slower=1.2))]
BAD = [
    Kind("errors 1% to 3%", Version(errors=0.03)),
    Kind("invalid 2% to 10%", Version(invalid=0.1)),
    Kind("invalid 2% to 30%", Version(invalid=0.3)),
    Kind("first token +50%", Version(slower=1.5)),
    Kind("bad ratings 20% to 40%", Version(bad=0.4)),
]


@dataclass(frozen=True)
class Traffic:
    """Requests in chronological order. In arrays with two rows, the first is for production and the second for the
    candidate.

    Attributes:
        place: position of each request's unit between 0 and 1; a unit below the candidate's share is assigned to it.
        unit: number of each request's user, or `SINGLE`.
        bad: whether the rating is bad, if the request was rated.
    """

    time: Floats
    place: Floats
    unit: NDArray[np.int64]
    failed: Flags
    invalid: Flags
    first_token_s: Floats
    rated: Flags
    bad: Flags


def generate(kind: Kind, seconds: float, seed: int) -> Traffic:
    """Return the traffic of a kind of rollout for the given duration, in seconds."""
    draw = np.random.default_rng(seed)
    time, unit, place, rates, speed = _requests(kind.shape, seconds, draw)
    order = np.argsort(time, kind="stable")
    time, unit, place, rates, speed = time[order], unit[order], place[order], rates[order], speed[order]
    versions = (Version(), kind.candidate)
    count = len(time)

    def happens(shares: Sequence[float | Floats]) -> Flags:
        chances = draw.random(count)
        return np.stack([chances < share for share in shares])

    within = np.sqrt(_SIGMA**2 - _USER_SIGMA**2) if kind.shape is Shape.SESSIONS else _SIGMA
    times = _MEDIAN_S * speed * np.exp(within * draw.standard_normal(count))
    return Traffic(
        time=time,
        place=place,
        unit=unit,
        failed=happens([version.errors * rates for version in versions]),
        invalid=happens([version.invalid * rates for version in versions]),
        first_token_s=np.stack([times * version.slower for version in versions]),
        rated=draw.random(count) < _RATED,
        bad=happens([version.bad for version in versions]),
    )


def _requests(
    shape: Shape, seconds: float, draw: np.random.Generator
) -> tuple[Floats, NDArray[np.int64], Floats, Floats, Floats]:
    """Return the times, units, places, rate factors and time factors of all requests, in any order."""
    count = int(draw.poisson(seconds * REQUESTS_PER_S))
    time: Floats = draw.random(count) * seconds
    unit: NDArray[np.int64] = np.full(count, SINGLE, dtype=np.int64)
    place: Floats = draw.random(count)
    rates: Floats = np.ones(count)
    speed: Floats = np.ones(count)
    match shape:
        case Shape.SESSIONS:
            lengths = draw.integers(_SESSION_LENGTHS[0], _SESSION_LENGTHS[1] + 1, count // sum(_SESSION_LENGTHS) * 2)
            users = np.repeat(np.arange(len(lengths)), lengths)
            gaps = draw.exponential(_SESSION_GAP_S, len(users))
            since = np.cumsum(gaps) - np.repeat(np.cumsum(gaps)[np.cumsum(lengths) - lengths], lengths)
            time = (draw.random(len(lengths)) * seconds)[users] + since
            rates = draw.gamma(0.3, 1 / 0.3, len(lengths))[users]
            speed = np.exp(_USER_SIGMA * draw.standard_normal(len(lengths)))[users]
            return time, users.astype(np.int64), draw.random(len(lengths))[users], rates, speed
        case Shape.HEAVY:
            heavy = draw.random(count) < _HEAVY_SHARE
            unit[heavy], place[heavy] = 0, draw.random()
            rates[heavy], speed[heavy] = 3.0, 1.5
        case Shape.DAY:
            start = draw.random() * 2 * np.pi
            load = np.sin(2 * np.pi * time / _DAY_S + start)
            kept = draw.random(count) < (1 + _SWING * load) / (1 + _SWING)
            time, unit, place, load = time[kept], unit[kept], place[kept], load[kept]
            rates, speed = 1 + _SWING * load, np.exp(0.5 * load)
    return time, unit, place, rates, speed
