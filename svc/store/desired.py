"""Desired states: one row a name, changed by compare-and-set, so that of two promotions at once one is told to wait."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy import Row, bindparam, select
from sqlalchemy.orm import Session

from svc.errors import BusyError
from svc.store.audit import AuditEntry, append_event
from svc.store.database import exclusive
from svc.store.tables import DesiredRow, target_columns
from svc.version import Format, Target, VersionId

_READ = select(DesiredRow.__table__).where(DesiredRow.name == bindparam("name"))
"""Made once, as for each model it is asked several times a second: to make it takes longer than to execute it."""


@dataclass(frozen=True, slots=True)
class Desired:
    """What a name shall serve.

    Attributes:
        previous: what it served before: where a rollback goes.
        generation: grows with every change.
        forced: why a version that failed a check shall be served all the same; None of any other.
    """

    target: Target
    previous: Target | None
    generation: int
    forced: str | None = None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.target.version.name


def read_desired(store: Store, name: str) -> Desired | None:
    """The desired state of a name, or None when nothing was ever promoted."""
    with store.connect() as connection:
        row = connection.execute(_READ, {"name": name}).one_or_none()
        return _desired(row) if row else None


def desired_names(store: Store) -> list[str]:
    """All names that have a desired state."""
    with Session(store) as session:
        return list(session.scalars(select(DesiredRow.name).order_by(DesiredRow.name)))


def change_desired(
    store: Store,
    seen: Desired | None,
    target: Target,
    previous: Target | None,
    *,
    forced: str | None = None,
    entry: AuditEntry | None = None,
) -> Desired:
    """Compare-and-set.

    Args:
        seen: the state that the decision was made on; None when there was none.
        forced: why, where the version failed a check.
        entry: goes into the audit log with the change, and gets its details here; None where nobody asked for it, as
            where a server puts back what it could not bring.

    Raises:
        BusyError: somebody else changed it since.
    """
    name, generation = target.version.name, (seen.generation if seen else 0) + 1
    with exclusive(store) as session:
        row = session.get(DesiredRow, name)
        if (row.generation if row else 0) != generation - 1:
            raise BusyError(
                f"somebody else changed what {name} serves just now", todo="see `svc status`, then try again"
            )
        session.merge(
            DesiredRow(
                **target_columns(target),
                generation=generation,
                previous_number=previous.version.number if previous else None,
                previous_format=previous.format if previous else None,
                changed_at=datetime.now(UTC),
                forced=forced,
            )
        )
        if entry is not None:
            before = str(seen.target) if seen else None
            details = {"generation": generation, "format": target.format, "before": before, "forced": bool(forced)}
            append_event(session, replace(entry, details=details))
    return Desired(target, previous, generation, forced)


def _desired(row: Row[Any]) -> Desired:
    previous = None
    if row.previous_number is not None:
        previous = Target(VersionId(row.name, row.previous_number), Format(row.previous_format))
    target = Target(VersionId(row.name, row.number), Format(row.format))
    return Desired(target, previous, row.generation, row.forced)
