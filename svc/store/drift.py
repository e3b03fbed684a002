"""Drift: where the watch over a version's traffic stands, and the alarms that it called.

What a state and a report say is monitoring's; here they are texts. An alarm is also a signal to others: what moved,
since when, and by which requests it is seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, and_, delete, select
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.store.tables import DriftAlarmRow, DriftStateRow
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
        since: when the requests began in which it was seen.
        ended_at: None while it lasts.
        moved: what moved, JSON.
        examples: ids of requests by which it is seen best.
        id: of its row; None before it has one.
    """

    signal: str
    since: datetime
    called_at: datetime
    ended_at: datetime | None
    moved: str
    examples: tuple[str, ...]
    id: int | None = None


def read_drift_states(store: Store, target: Target) -> dict[str, DriftState]:
    """The states of a version in a format, by signal."""
    query = select(DriftStateRow).where(_of(DriftStateRow, target))
    with Session(store) as session:
        rows = session.scalars(query)
        return {row.signal: DriftState(row.signal, row.state, row.report, row.checked_at) for row in rows}


def keep_drift(store: Store, target: Target, state: DriftState, alarms: Sequence[DriftAlarm]) -> None:
    """Keeps what a check found, all or nothing.

    Args:
        alarms: that began or ended; one with an id takes the place of that row.
    """
    key = _key(target)
    with Session(store) as session, session.begin():
        session.merge(
            DriftStateRow(
                **key, signal=state.signal, state=state.state, report=state.report, checked_at=state.checked_at
            )
        )
        for alarm in alarms:
            session.merge(
                DriftAlarmRow(
                    **key,
                    id=alarm.id,
                    signal=alarm.signal,
                    since=alarm.since,
                    called_at=alarm.called_at,
                    ended_at=alarm.ended_at,
                    moved=alarm.moved,
                    examples="\n".join(alarm.examples),
                )
            )
        if alarms:
            session.flush()
            newest = select(DriftAlarmRow.id).where(_of(DriftAlarmRow, target)).order_by(DriftAlarmRow.id.desc())
            ended = and_(_of(DriftAlarmRow, target), DriftAlarmRow.ended_at.is_not(None))
            session.execute(delete(DriftAlarmRow).where(ended, DriftAlarmRow.id.not_in(newest.limit(KEPT_ALARMS))))


def read_drift_alarms(store: Store, target: Target) -> list[DriftAlarm]:
    """The alarms of a version in a format that are kept, the newest first."""
    query = select(DriftAlarmRow).where(_of(DriftAlarmRow, target)).order_by(DriftAlarmRow.id.desc())
    with Session(store) as session:
        return [
            DriftAlarm(
                signal=row.signal,
                since=row.since,
                called_at=row.called_at,
                ended_at=row.ended_at,
                moved=row.moved,
                examples=tuple(row.examples.split("\n")) if row.examples else (),
                id=row.id,
            )
            for row in session.scalars(query)
        ]


def _key(target: Target) -> dict[str, str | int]:
    return {"name": target.version.name, "number": target.version.number, "format": target.format.value}


def _of(table: type[DriftStateRow] | type[DriftAlarmRow], target: Target) -> ColumnElement[bool]:
    return and_(*(getattr(table, column) == value for column, value in _key(target).items()))
