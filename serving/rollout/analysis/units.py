"""Groups requests into units of analysis.

Requests from the same user are not independent, so they count as one observation.
"""

import statistics
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

WINDOW_S = 60.0
"""Seconds for which a unit (a user, conversation or request) is observed, from the end of its first request."""


class Arm(StrEnum):
    """The version that a unit (a user, a conversation or a single request) is assigned to."""

    PRODUCTION = "production"
    CANDIDATE = "candidate"


@dataclass(frozen=True, slots=True)
class Request:
    """A finished request, reduced to the fields that the analysis needs.

    Attributes:
        unit: identifier of the user (or, if the user is unknown, of the conversation) that was assigned to the arm. If
            None, the request has neither and is a unit by itself.
        ended_at: when the request ended, in seconds since any fixed time.
        failed: whether the request failed because of the server. Requests that failed because of the client
            (4xx) are not added.
        valid: whether the output is valid, for example JSON that matches its schema. None if it was not
            checked.
        first_token_s: time to the first token, or the total time if the answer was not streamed, in seconds. None if
            the request failed.
    """

    unit: str | None
    arm: Arm
    ended_at: float
    failed: bool = False
    valid: bool | None = None
    first_token_s: float | None = None


@dataclass(frozen=True, slots=True)
class Rating:
    """A person's rating of an answer.

    Attributes:
        unit: as in `Request`.
        arm: the version that gave the answer.
    """

    unit: str | None
    arm: Arm
    negative: bool


class Unit(NamedTuple):
    """One observation, which combines the requests of a unit (a user, a conversation or a single request).

    Attributes:
        errors: share of failed requests.
        invalid: share of invalid outputs among the checked outputs, or None if no output was checked.
        first_token_s: median time to the first token, in seconds. None if no request has a time to the first
            token.
    """

    arm: Arm
    errors: float
    invalid: float | None
    first_token_s: float | None


@dataclass(slots=True)
class _OpenUnit:
    """A unit (a user, a conversation or a single request) that is still being observed, with its requests so far."""

    name: str
    arm: Arm
    closes_at: float
    requests: list[Request] = field(default_factory=list)

    def close(self) -> Unit:
        valid = [request.valid for request in self.requests if request.valid is not None]
        times = [request.first_token_s for request in self.requests if request.first_token_s is not None]
        return Unit(
            self.arm,
            errors=sum(request.failed for request in self.requests) / len(self.requests),
            invalid=valid.count(False) / len(valid) if valid else None,
            first_token_s=statistics.median(times) if times else None,
        )


class OncePerStep:
    """Tracks whether a unit (a user or a conversation) may still be observed in the current step of the rollout.

    When the candidate's share grows, some production units, drawn at random, are assigned to the candidate.
    Production units may therefore be observed once more. Candidate units stay with the candidate, so observing them
    again would add no new information.
    """

    def __init__(self) -> None:
        self._observed = dict[str, Arm]()

    def admit(self, unit: str | None, arm: Arm) -> bool:
        """Return whether a unit (a user or a conversation) may still be observed, and mark it as observed.

        If `unit` is None, the request is a unit by itself, which may always be observed.
        """
        if unit is None:
            return True
        if unit in self._observed:
            return False
        self._observed[unit] = arm
        return True

    def start_step(self) -> None:
        """Start a step, in which each user and conversation assigned to production may be observed once more."""
        self._observed = {unit: arm for unit, arm in self._observed.items() if arm is Arm.CANDIDATE}


class Units:
    """Groups requests into units (users, conversations or single requests), and returns the units in the order in which
    their observations end.

    Each observation of a user or conversation lasts `WINDOW_S`. Units assigned to production are observed once per
    step; units assigned to the candidate are observed once per rollout. A client with a third of the traffic therefore
    counts as much as any other client.
    """

    def __init__(self) -> None:
        self._open = dict[str, _OpenUnit]()
        self._order = deque[_OpenUnit]()
        self._once = OncePerStep()

    def add(self, request: Request) -> list[Unit]:
        """Add a request, and return the units (users, conversations or single requests) that are complete as a result.

        A request without a unit is a unit by itself, and is returned last.
        """
        closed: list[Unit] = []  # `list[Unit]()` takes a microsecond longer
        while self._order and self._order[0].closes_at <= request.ended_at:
            closed.append(self._close_oldest())
        name = request.unit
        if name is None:
            invalid = None if request.valid is None else float(not request.valid)
            closed.append(Unit(request.arm, float(request.failed), invalid, request.first_token_s))
        elif name in self._open:
            if self._open[name].arm is request.arm:
                self._open[name].requests.append(request)
        elif self._once.admit(name, request.arm):
            unit = _OpenUnit(name, request.arm, request.ended_at + WINDOW_S, [request])
            self._open[name] = unit
            self._order.append(unit)
        return closed

    def start_step(self) -> list[Unit]:
        """End the current observations, and return their units (users or conversations). Units that were assigned to
        production may be observed again in the new step, in either arm.
        """
        closed = [self._close_oldest() for _ in range(len(self._order))]
        self._once.start_step()
        return closed

    def _close_oldest(self) -> Unit:
        unit = self._order.popleft()
        del self._open[unit.name]
        return unit.close()
