"""Evaluates a rollout from the stored requests, ratings and shadow comparisons of both versions.

All evidence is read from the store, so a restarted server has the same evidence.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from statistics import fmean, median_high

from sqlalchemy import Engine as Store

from serving.rollout.analysis.analysis import Analysis, Margins, Signal, SignalVerdict
from serving.rollout.analysis.betting import STAKES, Budget
from serving.rollout.analysis.comparisons import Figure
from serving.rollout.analysis.units import Arm, Rating, Request
from serving.rollout.assigned_requests import read_assigned, read_ratings, requests_per_day
from serving.rollout.shadow_pairs import ShadowPair, read_shadow_pairs
from svc.evaluation.verdict import GateOutcome
from svc.settings.rollout import RolloutSettings, UnitKind
from svc.store.rollouts import RolloutRecord, SignalRow
from svc.store.swaps import last_queued_s

_VERDICTS_S = 10.0
"""Interval, in seconds, at which the verdicts on all signals are recomputed while the overall outcome is undecided.
Recomputing the verdicts takes 10 ms for 3,000 units (users or conversations), whereas computing the outcome takes only
microseconds."""
_CLOCKS_DIFFER = timedelta(minutes=1)
"""Assumed maximum difference between the clocks of servers that record ratings."""
_MIN_REQUESTS_FOR_SHARE = 100
_LARGE_SHARE = 0.5
_LABELS = {
    Signal.ERRORS: "failed requests",
    Signal.INVALID: "invalid JSON",
    Signal.FIRST_TOKEN: "time to first token (p95)",
    Signal.FEEDBACK: "bad ratings",
}


@dataclass(frozen=True, slots=True)
class Assessment:
    """A snapshot of the evidence.

    Attributes:
        units: number of the candidate's users, conversations or requests that have been observed; in the shadow step,
            the number of compared requests.
        is_passed: whether the candidate is proven, for every signal with data, not to be worse than the margin allows.
            Bad ratings can end a rollout, but a rollout does not wait for ratings, because they are rare.
        losses: text about the signals for which the candidate is proven to be worse than the margin allows; empty if
            there are none.
        text: one line about all signals with data.
        warning: text saying what prevents the evidence from growing; empty if nothing does.
        is_complete: whether the evidence completes the step: it covers all requests of the shadow step or, in a canary
            step, enough units were observed and `is_passed` is true.
    """

    units: int
    signals: tuple[SignalRow, ...]
    is_passed: bool
    losses: str
    text: str
    warning: str = ""
    is_complete: bool = False


class CanaryEvidence:
    """Evidence from the canary steps, in which each version answers different clients."""

    def __init__(self, store: Store, record: RolloutRecord) -> None:
        self._store = store
        self._record = record
        self._analysis = Analysis(_margins(record.plan), _budget(record.plan))
        self._last = 0
        self._rated = set[int]()
        self._rated_at = record.requested_at
        self._verdicts: tuple[SignalVerdict, ...] = ()
        self._next_verdicts = 0.0
        self._next_step_at: datetime | None = None
        self._before = 0
        self._clients = _Clients()

    def start_step(self, began_at: datetime) -> None:
        """Start the next step with the first request received at or after `began_at`.

        Args:
            began_at: when the candidate's share of the traffic grew. After a restart of the server, this may be long
                ago.
        """
        self._next_step_at = began_at

    def assess(self) -> Assessment:
        """Read new requests and ratings, and return a snapshot of the evidence."""
        for assigned in read_assigned(self._store, self._record, self._last):
            self._last = assigned.id
            if self._next_step_at is not None and assigned.started_at >= self._next_step_at:
                self._analysis.start_step()
                self._before, self._next_step_at = self._analysis.units, None
                self._clients = _Clients()
            if (request := assigned.observed) is not None:
                self._analysis.add(request)
                self._clients.add(request.unit)
        for assigned, given_at, bad in read_ratings(self._store, self._record, self._rated_at - _CLOCKS_DIFFER):
            self._rated_at = max(self._rated_at, given_at)
            if assigned.id not in self._rated:
                self._rated.add(assigned.id)
                self._analysis.rate(Rating(assigned.unit, assigned.arm, negative=bad))
        units = 0 if self._next_step_at is not None else self._analysis.units - self._before
        decided = self._analysis.outcome is not GateOutcome.UNDECIDED
        if decided or time.monotonic() >= self._next_verdicts:
            self._verdicts, self._next_verdicts = self._analysis.verdicts(), time.monotonic() + _VERDICTS_S
        kind = "requests" if self._record.plan.unit is UnitKind.REQUEST else "users or conversations"
        result = _assessment(self._analysis.outcome, self._verdicts, units, f"{units} {kind} of the candidate")
        is_complete = result.is_passed and units >= self._record.plan.min_units
        warning = _few_clients_text(self._record.name) if self._clients.is_mostly_one else ""
        return replace(result, is_complete=is_complete, warning=warning)


class _Clients:
    """Counts the requests of a canary step per user or conversation, for both versions together."""

    def __init__(self) -> None:
        self._requests = Counter[str]()
        self._all = self._most = 0

    def add(self, unit: str | None) -> None:
        """Count a request. A request without a user or conversation (None) counts as a separate client."""
        self._all += 1
        if unit is not None:
            self._requests[unit] += 1
            self._most = max(self._most, self._requests[unit])

    @property
    def is_mostly_one(self) -> bool:
        """Whether one user or conversation sends more than half of the requests. False if there are too few requests to
        tell.
        """
        return self._all >= _MIN_REQUESTS_FOR_SHARE and self._most > _LARGE_SHARE * self._all


def _few_clients_text(name: str) -> str:
    """Return the warning about a single client that sends most of the requests. It contains no numbers, so that its
    text never changes and it is shown only once.
    """
    return (
        "one user or conversation sends more than half of the requests but counts as one observation, so this step "
        "depends on the requests of other clients. If this user stands for many users, send `user` with each request; "
        f"if the requests are independent, set models.{name}.rollout.unit: request, and promote again"
    )


class ShadowEvidence:
    """Compares both versions' answers to the same requests.

    Latencies are shown but do not affect the outcome, because the mirrored requests run one or two at a time, whereas
    production requests run under the current load.

    Args:
        wanted: function that returns the number of requests after which the step ends.
    """

    def __init__(self, store: Store, record: RolloutRecord, wanted: Callable[[], int]) -> None:
        self._store = store
        self._record = record
        self._wanted = wanted
        self._analysis = Analysis(_margins(record.plan), _budget(record.plan))
        self._pairs: list[ShadowPair] = []

    def assess(self) -> Assessment:
        """Read new pairs of answers, and return a snapshot of the evidence."""
        for pair in read_shadow_pairs(self._store, self._record.id, skip=len(self._pairs)):
            # Both observations of a user end together, so that they are compared with each other.
            at = float(len(self._pairs))
            for arm in Arm:
                unit = f"{pair.unit} {arm}" if pair.unit else None
                failed, valid = getattr(pair, f"{arm}_failed"), getattr(pair, f"{arm}_valid")
                self._analysis.add(Request(unit, arm, at, failed, valid))
            self._pairs.append(pair)
        is_complete = len(self._pairs) >= self._wanted()  # read once, because it may change meanwhile
        if is_complete:
            self._analysis.start_step()  # ends all observations
        verdicts = self._analysis.verdicts()
        result = _assessment(self._analysis.outcome, verdicts, len(self._pairs), _pairs_text(self._pairs))
        return replace(result, is_complete=is_complete)


def exclusions(result: Assessment) -> str:
    """Return text that lists the signals for which the candidate is proven not to be worse than the margin allows,
    those for which this is not proven, and those that were not compared.
    """
    rows = {row.signal: row.outcome == GateOutcome.PASSED for row in result.signals}
    kinds = {"excluded": True, "not excluded": False, "not compared": None}
    labels = {kind: [_LABELS[each] for each in Signal if rows.get(each) is is_so] for kind, is_so in kinds.items()}
    return "losses beyond the margins: " + "; ".join(f"{kind}: {', '.join(labels[kind]) or 'none'}" for kind in kinds)


def open_questions(result: Assessment, min_units: int) -> str:
    """Return why a candidate must not be promoted even though a replay did not prove it to be worse.

    The text is empty if the candidate may be promoted.
    """
    units = next((row.units for row in result.signals if row.signal == Signal.ERRORS), 0)
    if units < min_units:
        return f"only {units} users or conversations were compared; at least {min_units} are required: {result.text}"
    labels = [_LABELS[Signal(row.signal)] for row in result.signals if _may_be_lost(row)]
    return (
        f"losses beyond the margins were measured, but not proven: {', '.join(labels)}: {result.text}" if labels else ""
    )


def _may_be_lost(row: SignalRow) -> bool:
    return row.outcome != GateOutcome.PASSED and (row.candidate or 0.0) - (row.production or 0.0) > row.margin


def _replay_expectations(store: Store, record: RolloutRecord, kept: int) -> list[str]:
    seconds = last_queued_s(store, record.previous)
    return [
        f"replay: there is memory for only one engine, so {record.target} answers "
        f"{min(record.plan.shadow, kept)} of {kept} stored requests to {record.previous} while no client sends "
        "requests, and no canary follows",
        f"a request that arrives during the replay waits until {record.previous} is loaded again: "
        + (
            "an unknown time, because it was never loaded in place (two loads must fit in `serve.queue_timeout_s`)"
            if seconds is None
            else f"about {seconds:.1f} s, or twice that if the candidate is being loaded"
        ),
        "stored requests lack tools, response formats, ratings and times under the same load: these are not compared",
    ]


def expectations(store: Store, record: RolloutRecord, kept: int | None = None) -> list[str]:
    """Return texts to display before a rollout starts. They say how long it will take and which regressions it can
    detect.

    Args:
        kept: number of stored requests, if they are replayed because there is memory for only one engine. None if
            requests are not replayed.
    """
    plan, per_day = record.plan, requests_per_day(store, record.name)
    deadline = timedelta(seconds=plan.max_step_s)
    texts = [f"requests in the last day: {per_day:,}; deadline of each step: {deadline}"]
    if kept is not None:
        return texts + _replay_expectations(store, record, kept)
    if plan.shadow:
        texts.append(
            f"shadow: {plan.shadow} requests, {_takes(plan.shadow, per_day)} at the request rate of the last day"
        )
    if len(plan.canary) > 1:
        units, share = _units_to_pass(plan), plan.canary[0] / 100
        texts.append(
            f"canary at {plan.canary[0]:g}%: to rule out a regression, the candidate must serve about {units} users or "
            f"conversations without a failure: {_takes(units / share, per_day)} at the request rate of the last day, "
            "if each sends one request"
        )
        if per_day and 86_400 * units / share / per_day > plan.max_step_s:
            texts.append(
                "the canary step would take longer than its deadline; raise max_step_s or the margins, or begin with a "
                "larger share"
            )
        losses = Analysis(_margins(plan), _budget(plan)).detectable(units, share)
        texts.append(
            f"regressions that would be detected with 80% power after {units} users or conversations: "
            f"{100 * losses[Signal.ERRORS]:.1f} percentage points more failed requests, "
            f"{100 * losses[Signal.INVALID]:.1f} percentage points more invalid JSON, or "
            f"{losses[Signal.FIRST_TOKEN]:.1f} times production's time to first token"
        )
    return texts


def _takes(requests: float, per_day: int) -> str:
    """Return, as text, how long it takes to receive the given number of requests, based on the last day's traffic."""
    if not per_day:
        return "an unknown time"
    return f"about {timedelta(seconds=round(86_400 * requests / per_day))}"


def _units_to_pass(plan: RolloutSettings) -> int:
    """Return roughly how many users or conversations the candidate must serve for a canary step to pass, if neither
    version ever fails.

    A block without failures multiplies the wealth of the bet with the largest stake by
    1 + stake * margin / (1 - margin); see serving.rollout.analysis.betting.
    """
    margin = min(plan.max_errors, plan.max_invalid)
    growth = math.log1p(max(STAKES) * margin / (1 - margin))
    return max(plan.min_units, math.ceil(math.log(len(STAKES) / Budget().wrong_advance) / growth))


def _budget(plan: RolloutSettings) -> Budget:
    """Return the allowed probabilities of wrong decisions.

    If there are both shadow and canary steps, they share the budget.
    """
    budget = Budget()
    return replace(budget, wrong_rollback=budget.wrong_rollback / 2) if plan.shadow and plan.canary else budget


def _margins(plan: RolloutSettings) -> Margins:
    return Margins(plan.max_errors, plan.max_invalid, plan.max_slowdown, plan.max_negative)


def _assessment(outcome: GateOutcome, verdicts: tuple[SignalVerdict, ...], units: int, summary: str) -> Assessment:
    with_data = [verdict for verdict in verdicts if verdict.has_data]
    losses = [_text(verdict) for verdict in with_data if verdict.outcome is GateOutcome.FAILED]
    return Assessment(
        units=units,
        signals=tuple(map(_row, with_data)),
        is_passed=outcome is GateOutcome.PASSED,
        losses="; ".join(losses),
        text="; ".join([summary, *map(_text, with_data)]),
    )


def _text(verdict: SignalVerdict) -> str:
    production, candidate = verdict.production.value or 0.0, verdict.candidate.value or 0.0
    label, outcome = _LABELS[verdict.signal], verdict.outcome.value
    if verdict.signal is Signal.FIRST_TOKEN:
        allowed = f"at most {verdict.margin:g} times allowed"
        both = (
            f"{candidate:.3f} s{_limits(verdict.candidate)} instead of {production:.3f} s{_limits(verdict.production)}"
        )
        return f"{label} {both}, {allowed}: {outcome}"
    allowed = f"allowed increase {100 * verdict.margin:g} percentage points"
    return f"{label} {100 * candidate:.1f}% instead of {100 * production:.1f}%, {allowed}: {outcome}"


def _limits(figure: Figure) -> str:
    """Return the anytime-valid limits of a percentile as text, or an empty string if there are too few units."""
    return "" if figure.low is None or figure.high is None else f" [{figure.low:.3f}, {figure.high:.3f}]"


def _row(verdict: SignalVerdict) -> SignalRow:
    loss = verdict.loss
    return SignalRow(
        signal=verdict.signal.value,
        outcome=verdict.outcome.value,
        production=verdict.production.value,
        candidate=verdict.candidate.value,
        low=loss.low if loss else None,
        high=loss.high if loss else None,
        margin=verdict.margin,
        units=verdict.candidate.units,
    )


def _pairs_text(pairs: list[ShadowPair]) -> str:
    """Return text with comparison metrics that are displayed but do not affect the outcome."""
    compared = [pair for pair in pairs if pair.agrees is not None]
    if not compared:
        return f"{len(pairs)} requests compared"
    equal = sum(pair.agrees is True for pair in compared) / len(compared)
    ends = sum(pair.production_finish == pair.candidate_finish for pair in compared) / len(compared)
    arms = (Arm.CANDIDATE, Arm.PRODUCTION)
    tokens, seconds = (
        [median_high([getattr(pair, f"{arm}_{name}") or 0 for pair in compared]) for arm in arms]
        for name in ("tokens", "seconds")
    )
    return (
        f"{len(pairs)} requests compared; {100 * equal:.0f}% equal answers, {100 * ends:.0f}% equal finish reasons, "
        f"median length {tokens[0]:g} instead of {tokens[1]:g} tokens, "
        f"median time {seconds[0]:.2f} s instead of {seconds[1]:.2f} s{_logprobs_text(compared)}"
    )


def _logprobs_text(pairs: list[ShadowPair]) -> str:
    """Return text with both versions' mean log-probabilities over the requests for which both are known; empty if there
    are none.
    """
    known = [
        (pair.candidate_logprob, pair.production_logprob)
        for pair in pairs
        if pair.candidate_logprob is not None and pair.production_logprob is not None
    ]
    if not known:
        return ""
    candidate, production = map(fmean, zip(*known, strict=True))
    return (
        f", mean log-probability {candidate:.2f} instead of {production:.2f} nats per token "
        f"({len(known)} request{'s' if len(known) > 1 else ''})"
    )
