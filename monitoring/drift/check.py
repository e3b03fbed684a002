"""One check of a version's traffic: what is new goes through the detectors, and what they find is kept.

Whoever makes it and how often changes nothing in what is found (monitoring.drift.two_sample.alpha_spending). One
process at a time makes it, held by a lock of the home.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Engine as Store

from monitoring.drift.detector import Alarm
from monitoring.drift.report import Moved, SignalReport, Status, new_examples
from monitoring.drift.streams import (
    MEMORY,
    AnswerStream,
    Items,
    PromptStream,
    RatingStream,
    Stream,
    StreamComparison,
    StreamState,
)
from monitoring.drift.two_sample.alpha_spending import BURST, REQUESTS_PER_DAY, Signal
from svc.drift_reference.reference import Reference, read_reference
from svc.redaction import Redactor
from svc.registry.registry import Registry
from svc.settings import RequestLogSettings
from svc.store.answered import content_is_kept
from svc.store.drift import DriftAlarm, DriftState, keep_drift, read_drift_alarms, read_drift_states
from svc.version import Target

log = logging.getLogger(__name__)

LOCK_FILE: Final = "drift.lock"
STATE: Final = TypeAdapter(StreamState)
REPORT: Final = TypeAdapter(SignalReport)
MOVED: Final = TypeAdapter(tuple[Moved, ...])
_DAY_S = 86_400


class DriftCheck:
    """Checks versions of one home; remembers the reference of one version a name.

    Args:
        settings: how the server redacts what it keeps.
        clock: the time now.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        settings: RequestLogSettings,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._registry = registry
        self._store = store
        self._redactor = Redactor(settings.redact)
        self._clock = clock
        self._references: dict[str, tuple[Target, Reference]] = {}

    def run(self, target: Target) -> list[SignalReport]:
        """Looks at all that is new of a version in a format, and keeps what it finds.

        Raises:
            NotFoundError: no such version.
            IntegrityError: its files are not what its manifest says.
        """
        kept = read_drift_states(self._store, target)
        held = self._read_reference(target)
        states = {signal: _read_state(kept.get(signal)) for signal in Signal}
        now = self._clock()
        content_kept = content_is_kept(self._store, target)
        streams: tuple[Stream, ...] = (
            PromptStream(self._store, target, held, content_kept),
            AnswerStream(self._store, target, held, content_kept),
            RatingStream(self._store, target, states[Signal.PEOPLE], now),
        )
        return [_Advance(self._store, target, stream, states[stream.signal], now).run() for stream in streams]

    def _read_reference(self, target: Target) -> Reference:
        name = target.version.name
        if name not in self._references or self._references[name][0] != target:
            self._references[name] = target, read_reference(self._registry, target, self._redactor)
        return self._references[name][1]


class _Advance:
    """One stream, taken from its last state to now."""

    def __init__(self, store: Store, target: Target, stream: Stream, state: StreamState, now: datetime) -> None:
        self._store = store
        self._target = target
        self._stream = stream
        self._state = _refilled(state, now)
        self._now = now
        self._alarms: list[DriftAlarm] = []

    def run(self) -> SignalReport:
        """Takes it, and keeps the result."""
        report = self._report()
        state = DriftState(
            report.signal,
            STATE.dump_json(self._state).decode("utf-8"),
            REPORT.dump_json(report).decode("utf-8"),
            self._now,
        )
        keep_drift(self._store, self._target, state, self._alarms)
        return report

    def _report(self) -> SignalReport:
        signal, reference = self._stream.signal, self._stream.reference
        if self._stream.off:
            if self._state.watch.alarm:
                self._ended(self._now)
                self._state = replace(self._state, watch=replace(self._state.watch, alarm=None, fresh=0))
            return SignalReport(signal, Status.OFF, self._stream.off)
        if reference is None:
            return SignalReport(signal, Status.WAITING, "there is nothing to compare with yet: too few ratings")
        comparison = StreamComparison.of(self._stream, reference, self._target)
        detector = comparison.detector
        if not detector.windows:
            return SignalReport(signal, Status.OFF, f"there are too few examples to compare with: {reference.size}")
        items = self._take(comparison)
        watch = self._state.watch
        size = min(detector.memory, watch.fresh or detector.memory, items.sample.size)
        if not watch.alarm and watch.fresh < detector.windows[0].size:
            why = f"the first comparison is made with {detector.windows[0].size}"
            return SignalReport(signal, Status.WAITING, why, watch.position)
        live = items.sample.part(items.sample.size - size, items.sample.size)
        # Rows of the window may have been forgotten since.
        lines = comparison.lines(live, watch.position) if size else ()
        status = Status.ALARM if watch.alarm else Status.STEADY
        lasting = self._lasting() if watch.alarm else None
        moved = tuple(dict.fromkeys(finding.test for finding in watch.alarm.findings)) if watch.alarm else ()
        return SignalReport(
            signal,
            status,
            items=watch.position,
            window=size,
            lines=lines,
            alarm_since=lasting.since if lasting else None,
            moved=moved,
            newest_at=items.times[-1] if items.times else None,
        )

    def _take(self, comparison: StreamComparison) -> Items:
        state = self._state
        items = self._stream.read(state, int(state.allowance))
        watch, events = comparison.detector.advance(state.watch, items.sample, items.new)
        first = watch.position - items.sample.size
        for event in events:
            place = event.position - first
            if event.alarm:
                self._alarms.append(self._called(event.alarm, comparison, items, place))
            else:
                self._ended(items.times[place - 1])
        base = self._stream.base if isinstance(self._stream, RatingStream) else ()
        self._state = replace(
            state,
            cursor=items.cursor,
            memory=items.ids[-MEMORY:],
            watch=watch,
            allowance=state.allowance - items.new,
            base=base,
        )
        return items

    def _called(self, alarm: Alarm, comparison: StreamComparison, items: Items, stop: int) -> DriftAlarm:
        start = stop - alarm.size
        live = items.sample.part(start, stop)
        lines = {line.name: line for line in comparison.lines(live, alarm.position)}
        moved = tuple(
            Moved(replace(lines[found.test], p=found.p), found.alpha)
            for found in alarm.findings
            if found.size == alarm.size
        )
        names = ", ".join(found.line.name for found in moved)
        places = new_examples(comparison.tests, alarm.findings, comparison.reference, live)
        log.warning("%s: %s drift: %s", self._target, self._stream.signal, names)
        return DriftAlarm(
            signal=self._stream.signal,
            since=items.times[start],
            called_at=items.times[stop - 1],
            ended_at=None,
            moved=MOVED.dump_json(moved).decode("utf-8"),
            examples=tuple(items.request_ids[start + place] for place in places),
        )

    def _ended(self, time: datetime) -> None:
        lasting = self._lasting()
        if lasting is None:
            return
        if lasting in self._alarms:
            self._alarms.remove(lasting)
        self._alarms.append(replace(lasting, ended_at=time))
        log.info("%s: %s drift has ended", self._target, self._stream.signal)

    def _lasting(self) -> DriftAlarm | None:
        """The alarm that has not ended: of this check, else of an earlier one."""
        kept = read_drift_alarms(self._store, self._target)
        mine = [*self._alarms[::-1], *(alarm for alarm in kept if alarm.signal == self._stream.signal)]
        ended = {alarm.id for alarm in self._alarms if alarm.ended_at and alarm.id is not None}
        return next((alarm for alarm in mine if alarm.ended_at is None and alarm.id not in ended), None)


def _read_state(kept: DriftState | None) -> StreamState:
    """Where the watch stood; at its beginning, where another release left what this one cannot read."""
    try:
        return STATE.validate_json(kept.state) if kept else StreamState()
    except ValidationError:
        log.warning("the watch for drift begins anew: its state cannot be read", exc_info=True)
        return StreamState()


def _refilled(state: StreamState, now: datetime) -> StreamState:
    """More may be looked at the longer ago the last check was."""
    if state.refilled_at is None:
        return replace(state, allowance=BURST, refilled_at=now)
    earned = (now - state.refilled_at).total_seconds() / _DAY_S * REQUESTS_PER_DAY
    return replace(state, allowance=min(BURST, state.allowance + max(0.0, earned)), refilled_at=now)
