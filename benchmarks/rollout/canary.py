"""A canary rollout, decided by the real analysis."""

from dataclasses import dataclass
from enum import StrEnum

from benchmarks.rollout.traffic import SINGLE, Traffic
from serving.rollout.analysis.analysis import Analysis
from serving.rollout.analysis.units import Arm, Rating, Request
from svc.evaluation.verdict import GateOutcome

SHARES = (0.05, 0.25)
"""The candidate's shares of the traffic before it serves everything."""
DEADLINE_S = 7200.0
"""Maximum time at one share."""
MIN_UNITS = 50
"""Candidate units at a share before the rollout advances."""
_LOOK_EVERY = 50
"""Requests between two checks, 5 s."""
_CHUNK = 2_000


class End(StrEnum):
    """Outcome of a rollout."""

    ROLLED_BACK = "rolled back"
    FULL = "full"
    UNDECIDED = "undecided"
    """The deadline passed without proof of a loss, and without ruling out a loss beyond the margin in every signal."""


@dataclass(frozen=True)
class Decision:
    """Result of a rollout.

    Attributes:
        exposed: number of requests to the candidate until the decision.
        after_s: time until the decision, in seconds.
    """

    end: End
    exposed: int
    after_s: float


def decide(traffic: Traffic) -> Decision:
    """Roll a candidate out step by step, until the analysis decides or a deadline passes."""
    analysis, exposed, first, start = Analysis(), 0, 0, 0.0
    for share in SHARES:
        units_before = analysis.units
        advanced = False
        while not advanced:
            last = min(first + _CHUNK, int(traffic.time.searchsorted(start + DEADLINE_S)))
            if last <= first:
                return Decision(End.UNDECIDED, exposed, start + DEADLINE_S)
            for number, (request, rating) in enumerate(_arrivals(traffic, first, last, share), first):
                exposed += request.arm is Arm.CANDIDATE
                analysis.add(request)
                if rating:
                    analysis.rate(rating)
                if number % _LOOK_EVERY:
                    continue
                outcome = analysis.outcome
                if outcome is GateOutcome.FAILED:
                    return Decision(End.ROLLED_BACK, exposed, request.ended_at)
                if outcome is GateOutcome.PASSED and analysis.units - units_before >= MIN_UNITS:
                    first, start, advanced = number + 1, request.ended_at, True
                    break
            else:
                first = last
        analysis.start_step()
    return Decision(End.FULL, exposed, start)


def _arrivals(traffic: Traffic, first: int, last: int, share: float) -> list[tuple[Request, Rating | None]]:
    """Return the requests at these indexes, with their ratings, as the analysis receives them."""
    part = slice(first, last)
    arms = (traffic.place[part] < share).astype(int)
    results = (traffic.failed, traffic.invalid, traffic.first_token_s, traffic.bad)
    chosen = [array[:, part][arms, range(last - first)].tolist() for array in results]
    names = [None if unit == SINGLE else str(unit) for unit in traffic.unit[part].tolist()]
    columns = (arms.tolist(), traffic.time[part].tolist(), traffic.rated[part].tolist(), *chosen)
    arrivals = list[tuple[Request, Rating | None]]()
    for name, in_candidate, time, rated, failed, invalid, seconds, bad in zip(names, *columns, strict=True):
        arm = Arm.CANDIDATE if in_candidate else Arm.PRODUCTION
        if failed:
            arrivals.append((Request(name, arm, time, True), None))
        else:
            rating = Rating(name, arm, bad) if rated else None
            arrivals.append((Request(name, arm, time, False, not invalid, seconds), rating))
    return arrivals
