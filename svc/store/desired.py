"""Desired states, with one row per model name. Rows are changed by compare-and-set, so that one of two
concurrent promotions fails.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sqlalchemy import Engine as Store
from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from svc.errors import BusyError
from svc.store.audit import AuditEntry, append_event
from svc.store.database import announce_change, exclusive
from svc.store.gate_rows import GateRow, gate_details
from svc.store.tables import DesiredRow, target_columns
from svc.version import Format, Target, VersionId

_READ = select(DesiredRow.__table__).where(DesiredRow.name == bindparam("name"))
"""Prebuilt query. It runs several times per second per model, and building it takes longer than executing
it."""


@dataclass(frozen=True, slots=True)
class Desired:
    """Desired state of a model: which version to serve.

    Attributes:
        previous: version to which a rollback returns, or None if there is none.
        generation: number that increases with every change.
        forced: reason for serving a version that failed a gate; None for any other version.
    """

    target: Target
    previous: Target | None
    generation: int
    forced: str | None = None

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.target.version.name


def read_desired(store: Store, name: str) -> Desired | None:
    """Return the desired state of a model, or None if no version of it was ever promoted."""
    with store.connect() as connection:
        row = connection.execute(_READ, {"name": name}).one_or_none()
    if row is None:
        return None
    previous = None
    if row.previous_number is not None:
        previous = Target(VersionId(name, row.previous_number), Format(row.previous_format))
    return Desired(Target(VersionId(name, row.number), Format(row.format)), previous, row.generation, row.forced)


def desired_names(store: Store) -> list[str]:
    """Return the names of all models that have a desired state."""
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
    gates: tuple[GateRow, ...] = (),
) -> Desired:
    """Change the desired state if it still equals `seen`, and return the new state.

    Args:
        seen: the state on which the decision was based, or None if there was none.
        forced: reason for serving a version that failed a gate; None for any other version.
        entry: audit event to record with the change, to which the change's details are added. None if no
            user requested the change, for example when a server reverts a failed change.
        gates: results of the gates of a promotion, recorded with the audit event.

    Raises:
        BusyError: the desired state no longer equals `seen`.
    """
    with exclusive(store) as session:
        return write_desired(session, seen, target, previous, forced=forced, entry=entry, gates=gates)


def write_desired(
    session: Session,
    seen: Desired | None,
    target: Target,
    previous: Target | None,
    *,
    forced: str | None = None,
    entry: AuditEntry | None = None,
    gates: tuple[GateRow, ...] = (),
) -> Desired:
    """Change the desired state in an `exclusive` transaction; see `change_desired`."""
    name, generation = target.version.name, (seen.generation if seen else 0) + 1
    row = session.get(DesiredRow, name)
    if (row.generation if row else 0) != generation - 1:
        raise BusyError(
            f"another user has just changed the desired version of {name}", todo="check svc status, then retry"
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
    announce_change(session.connection())
    if entry is not None:
        before = str(seen.target) if seen else None
        details = {"generation": generation, "format": target.format, "before": before, "forced": bool(forced)}
        append_event(session, replace(entry, details=details | gate_details(gates)))
    return Desired(target, previous, generation, forced)
