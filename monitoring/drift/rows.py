"""Stores drift detection results: the detectors' states for a version's traffic, and the alarms.

States and reports are opaque texts here, interpreted only by monitoring. An alarm names the feature that
drifted, the start of the drift, and requests that show it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine as Store
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from svc.store.database import exclusive
from svc.store.leases import Lease, require_lease
from svc.store.tables import DriftAlarmRow, DriftBaselineRow, DriftStateRow, is_of, target_columns
from svc.version import Target

KEPT_ALARMS = 100
"""Maximum number of ended alarms to keep per version and format."""


@dataclass(frozen=True, slots=True)
class DriftState:
    """Detector state and latest result for one drift signal.

    Attributes:
        signal: the signal's name.
        state: the detector's state after the last check, as JSON; the next check resumes from it.
        report: result of the last check, as JSON.
    """

    signal: str
    state: str
    report: str
    checked_at: datetime


@dataclass(frozen=True, slots=True)
class DriftAlarm:
    """A drift alarm for one feature.

    Attributes:
        feature: the feature that drifted.
        since: time of the first request that shows the drift.
        ended_at: when the alarm ended, or None while it is active.
        moved: how the feature's values have changed, as JSON.
        examples: ids of the requests that show the drift best.
        id: row id of the alarm, or None before it is stored.
    """

    signal: str
    feature: str
    since: datetime
    called_at: datetime
    ended_at: datetime | None
    moved: str
    examples: tuple[str, ...]
    id: int | None = None


def read_drift_states(store: Store, target: Target) -> dict[str, DriftState]:
    """Return the drift detection states for a version in a given format, keyed by signal."""
    query = select(DriftStateRow).where(is_of(DriftStateRow, target))
    with Session(store) as session:
        return {row.signal: row.read(DriftState) for row in session.scalars(query)}


def keep_drift(
    store: Store,
    target: Target,
    states: Sequence[DriftState],
    alarms: Sequence[DriftAlarm],
    baseline: bytes | None = None,
    *,
    lease: Lease | None = None,
) -> None:
    """Store the results of a drift check atomically.

    Args:
        alarms: alarms that began or ended; an alarm with an id replaces the row with that id.
        baseline: traffic newly accepted as the drift reference, or None to leave the reference unchanged.
        lease: lease that the drift check holds; None if only one home folder uses the store.

    Raises:
        LeaseLostError: another process has taken the lease. Nothing is stored.
    """
    key, mine = target_columns(target), is_of(DriftAlarmRow, target)
    newest = select(DriftAlarmRow.id).where(mine).order_by(DriftAlarmRow.id.desc()).limit(KEPT_ALARMS)
    with exclusive(store) as session:
        require_lease(session, lease)
        for state in states:
            session.merge(DriftStateRow.of(state, **key))
        for alarm in alarms:
            session.merge(DriftAlarmRow.of(alarm, **key, examples="\n".join(alarm.examples)))
        if baseline is not None:
            session.merge(DriftBaselineRow(**key, data=baseline))
        session.flush()
        old = delete(DriftAlarmRow).where(mine, DriftAlarmRow.id.not_in(newest))
        session.execute(old.where(DriftAlarmRow.ended_at.is_not(None)))


def read_drift_baseline(store: Store, target: Target) -> bytes | None:
    """Return the traffic accepted as the drift reference, or None if the version's own examples are the
    reference.
    """
    with Session(store) as session:
        return session.scalar(select(DriftBaselineRow.data).where(is_of(DriftBaselineRow, target)))


def read_drift_alarms(store: Store, target: Target) -> list[DriftAlarm]:
    """Return the stored drift alarms for a version in a given format, newest first."""
    query = select(DriftAlarmRow).where(is_of(DriftAlarmRow, target)).order_by(DriftAlarmRow.id.desc())
    with Session(store) as session:
        return [row.read(DriftAlarm, examples=row.examples.splitlines()) for row in session.scalars(query)]
