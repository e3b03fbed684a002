"""Drift: where the watch over a version's traffic stands, and the alarms that it called.

What a state and a report say is monitoring's; here they are texts. An alarm is also a signal to others: what moved,
since when, and by which requests it is seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine as Store
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from svc.store.tables import DriftAlarmRow, DriftBaselineRow, DriftStateRow, is_of, target_columns
from svc.version import Target

KEPT_ALARMS = 100
"""Of a version in a format: the newest, and those that last."""


@dataclass(frozen=True, slots=True)
class DriftState:
    """Where the watch over one signal stands.

    Attributes:
        signal: its name.
        state: what the next check starts from, JSON.
        report: what the last check saw, JSON.
    """

    signal: str
    state: str
    report: str
    checked_at: datetime


@dataclass(frozen=True, slots=True)
class DriftAlarm:
    """One alarm.

    Attributes:
        feature: what moved.
        since: when the requests began in which it was seen.
        ended_at: None while it lasts.
        moved: how it moved, JSON.
        examples: ids of requests by which it is seen best.
        id: of its row; None before it has one.
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
    """The states of a version in a format, by signal."""
    query = select(DriftStateRow).where(is_of(DriftStateRow, target))
    with Session(store) as session:
        return {row.signal: row.read(DriftState) for row in session.scalars(query)}


def keep_drift(
    store: Store,
    target: Target,
    states: Sequence[DriftState],
    alarms: Sequence[DriftAlarm],
    baseline: bytes | None = None,
) -> None:
    """Keep what a check found, all or nothing.

    Args:
        alarms: that began or ended; one with an id takes the place of that row.
        baseline: traffic that was accepted as the one to compare with.
    """
    key, mine = target_columns(target), is_of(DriftAlarmRow, target)
    newest = select(DriftAlarmRow.id).where(mine).order_by(DriftAlarmRow.id.desc()).limit(KEPT_ALARMS)
    with Session(store) as session, session.begin():
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
    """Return the traffic that was accepted as the one to compare with; None where the examples are that."""
    with Session(store) as session:
        return session.scalar(select(DriftBaselineRow.data).where(is_of(DriftBaselineRow, target)))


def read_drift_alarms(store: Store, target: Target) -> list[DriftAlarm]:
    """The alarms of a version in a format that are kept, the newest first."""
    query = select(DriftAlarmRow).where(is_of(DriftAlarmRow, target)).order_by(DriftAlarmRow.id.desc())
    with Session(store) as session:
        return [row.read(DriftAlarm, examples=row.examples.splitlines()) for row in session.scalars(query)]
