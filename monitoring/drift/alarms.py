"""A version's drift alarms. Each feature has at most one active alarm."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from pydantic import TypeAdapter
from sqlalchemy import Engine as Store

from monitoring.drift.budget import Signal
from monitoring.drift.evidence import FeatureState
from monitoring.drift.report import Lasting, Line
from monitoring.drift.rows import DriftAlarm, read_drift_alarms
from svc.version import Target

log = logging.getLogger(__name__)

MOVED = TypeAdapter(Line)


class AlarmBook:
    """The stored drift alarms of one version, updated by the current check.

    Attributes:
        changed: alarms that started or ended in this check.
    """

    def __init__(self, store: Store, target: Target) -> None:
        self._target = target
        stored = read_drift_alarms(store, target)
        self._lasting = {(alarm.signal, alarm.feature): alarm for alarm in stored if alarm.ended_at is None}
        self.changed: list[DriftAlarm] = []

    def lasting(self, signal: Signal) -> dict[str, DriftAlarm]:
        """Return a signal's active alarms, keyed by feature."""
        return {feature: alarm for (of, feature), alarm in self._lasting.items() if of == signal}

    def report(self, signal: Signal) -> tuple[Lasting, ...]:
        """Return a signal's active alarms in the form used by reports."""
        return tuple(Lasting(alarm.feature, alarm.since) for alarm in self.lasting(signal).values())

    def begin(
        self, signal: Signal, moved: Line, *, since: datetime, called_at: datetime, examples: Sequence[str]
    ) -> None:
        """Start an alarm for a changed feature.

        Args:
            moved: report line of the changed feature, including its reference and live values.
            since: time of the first item that shows the change.
            called_at: time of the item that raised the alarm.
            examples: ids of requests that show the change.
        """
        self.end(signal, moved.name, called_at)  # an alarm may still be active if the state of the detection was lost
        log.warning("%s: %s drift: %s", self._target, signal, moved.name)
        text = MOVED.dump_json(moved).decode("utf-8")
        alarm = DriftAlarm(signal, moved.name, since, called_at, None, text, tuple(examples))
        self._lasting[signal, moved.name] = alarm
        self.changed.append(alarm)

    def end(self, signal: Signal, feature: str, time: datetime) -> None:
        """End a feature's active alarm, if it has one."""
        alarm = self._lasting.pop((signal, feature), None)
        if alarm is None:
            return
        log.info("%s: %s drift has ended: %s", self._target, signal, feature)
        if alarm in self.changed:
            self.changed.remove(alarm)
        self.changed.append(replace(alarm, ended_at=time))

    def end_forgotten(self, signal: Signal, states: Mapping[str, FeatureState], time: datetime) -> None:
        """End stored alarms that are missing from the detector's state.

        This happens if the detector's state was lost, or was written by a release with different features.
        """
        for feature in self.lasting(signal):
            if feature not in states or states[feature].alarm is None:
                self.end(signal, feature, time)

    def end_all(self, signal: Signal, time: datetime) -> None:
        """End all alarms of a signal."""
        for feature in self.lasting(signal):
            self.end(signal, feature, time)
