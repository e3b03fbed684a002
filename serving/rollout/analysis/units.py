"""Units of analysis: the requests of one user count as one observation, because they depend on each other."""

import statistics
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

WINDOW_S = 60.0
"""Length of a unit's observation, from the end of its first request, in seconds."""


class Arm(StrEnum):
    """The version to which a unit is assigned."""

    PRODUCTION = "production"
    CANDIDATE = "candidate"


@dataclass(frozen=True, slots=True)
class Request:
    """A finished request, reduced to what the analysis needs.

    Attributes:
        unit: key of what was assigned to the arm: the user, or else the conversation. None if the request has neither,
            so that it is a unit by itself.
        ended_at: end of the request, in seconds since any fixed time.
        failed: whether the server failed the request. Requests with a client's own mistake (4xx) are not added.
        valid: whether the output is valid, for example JSON that matches its schema. None if nothing was checked.
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
    """The observation of a unit.

    Attributes:
        errors: share of failed requests.
        invalid: share of invalid outputs among the checked ones. None if nothing was checked.
        first_token_s: median time to the first token, in seconds. None if no request had one.
    """

    arm: Arm
    errors: float
    invalid: float | None
    first_token_s: float | None


@dataclass(slots=True)
class _OpenUnit:
    """The requests of a unit whose observation has not ended."""

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
    """Tells whether a unit may still be observed in the current step of the rollout.

    When the candidate's share grows, units of production may be observed once more: some of them, drawn at random, are
    assigned to the candidate now. Units of the candidate stay there, so another observation would repeat the first.
    """

    def __init__(self) -> None:
        self._observed = dict[str, Arm]()

    def admit(self, unit: str | None, arm: Arm) -> bool:
        """Return whether the unit has not been observed yet, and count it as observed. None is always a new unit."""
        if unit is None:
            return True
        if unit in self._observed:
            return False
        self._observed[unit] = arm
        return True

    def start_step(self) -> None:
        """Allow units of production to be observed again."""
        self._observed = {unit: arm for unit, arm in self._observed.items() if arm is Arm.CANDIDATE}


class Units:
    """Collects requests into units, closed in the order in which their observations end.

    A unit is observed for `WINDOW_S`, once per step, so a client with a third of the traffic counts as much as any
    other.
    """

    def __init__(self) -> None:
        self._open = dict[str, _OpenUnit]()
        self._order = deque[_OpenUnit]()
        self._once = OncePerStep()

    def add(self, request: Request) -> list[Unit]:
        """Add a request; return the units that close before it, then the request if it is a unit by itself."""
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
        """Close and return all open units, and allow units of production to be observed again, in either arm."""
        closed = [self._close_oldest() for _ in range(len(self._order))]
        self._once.start_step()
        return closed

    def _close_oldest(self) -> Unit:
        unit = self._order.popleft()
        del self._open[unit.name]
        return unit.close()
