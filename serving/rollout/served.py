"""Periods in which a model's versions were served, recorded by the server and shown by `svc history`."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from svc.store.database import exclusive
from svc.store.desired import Desired
from svc.store.leases import running_ids
from svc.store.tables import ServedRow, ServerRow, target_columns, target_of
from svc.version import Target


class Began(StrEnum):
    """Event that started a serving period."""

    START = "start"
    """A server started an engine that runs the version."""
    ADOPTED = "adopted"
    """A server started, and adopted an engine that was already running the version."""
    SWAP = "swap"
    """The version was promoted."""


class Ended(StrEnum):
    """Event that ended a serving period."""

    SWAP = "swap"
    """Another version replaced this version."""
    STOP = "stop"
    """The server was stopped, or the model was removed from it."""
    LOST = "lost"
    """The server died. The recorded end is an upper bound: the next server's start, or the
    server's last report if several servers use the store."""


@dataclass(frozen=True, slots=True)
class ServedSpan:
    """A period in which a server served a version.

    Attributes:
        generation: generation of the desired state.
        ended_at: end of the period. None if the period has not ended, or if the server died and no server
            has started since.
        server: id of the server; empty if no other server can use the store.
    """

    target: Target
    generation: int
    began_at: datetime
    began_by: Began
    ended_at: datetime | None
    ended_by: Ended | None
    server: str = ""


def begin_serving(
    store: Store, desired: Desired, began_by: Began, at: datetime | None = None, *, server: str = ""
) -> None:
    """Record that a server has started serving a version. A swap to the version that it already serves is ignored.

    When a server starts, the model's open serving periods on servers that are no longer running are also ended.

    Args:
        at: time of the start, or None for now.
        server: id of the server; empty if no other server can use the store.
    """
    now = at or datetime.now(UTC)
    with exclusive(store) as session:
        for row in session.scalars(_lasting(desired.name, server)):
            if began_by is Began.SWAP and target_of(row) == desired.target:
                return
            row.ended_at = now
            row.ended_by = Ended.SWAP if began_by is Began.SWAP else Ended.LOST
        if server and began_by is not Began.SWAP:
            _end_lost(session, desired.name, server, now)
        session.add(
            ServedRow(
                **target_columns(desired.target),
                server=server,
                generation=desired.generation,
                began_at=now,
                began_by=began_by,
            )
        )


def resume_serving(store: Store, server: str) -> None:
    """Reopen the last serving period of each model on a running server, if another server ended the period because the
    running server had not reported recently.
    """
    last = select(func.max(ServedRow.id)).where(ServedRow.server == server).group_by(ServedRow.name)
    is_lost = (ServedRow.ended_by == Ended.LOST) & ServedRow.id.in_(last)
    with exclusive(store) as session:
        for row in session.scalars(select(ServedRow).where(is_lost)):
            row.ended_at = row.ended_by = None


def end_serving(store: Store, name: str, at: datetime | None = None, *, server: str = "") -> None:
    """Record that a server no longer serves a model.

    Args:
        server: id of the server; empty if no other server can use the store.
    """
    with exclusive(store) as session:
        for row in session.scalars(_lasting(name, server)):
            row.ended_at, row.ended_by = at or datetime.now(UTC), Ended.STOP


def is_served_elsewhere(store: Store, name: str, server: str) -> bool:
    """Return whether a running server other than the given one serves a model.

    Args:
        server: id of the server; empty if no other server can use the store.
    """
    if not server:
        return False
    query = select(ServedRow.server).where(
        ServedRow.name == name, ServedRow.server != server, ServedRow.ended_at.is_(None)
    )
    with Session(store) as session:
        return not running_ids(session).isdisjoint(session.scalars(query))


def served_spans(store: Store, name: str) -> list[ServedSpan]:
    """Return the serving periods of a model on all servers, oldest first."""
    query = select(ServedRow).where(ServedRow.name == name).order_by(ServedRow.id)
    with Session(store) as session:
        spans = [row.read(ServedSpan, target=target_of(row)) for row in session.scalars(query)]
        if not any(span.server and span.ended_at is None for span in spans):
            return spans
        running, seen = running_ids(session), _last_reports(session)
    return [
        replace(span, ended_at=seen.get(span.server), ended_by=Ended.LOST)
        if span.server and span.ended_at is None and span.server not in running
        else span
        for span in spans
    ]


def _lasting(name: str, server: str) -> Select[ServedRow]:
    return select(ServedRow).where(ServedRow.name == name, ServedRow.server == server, ServedRow.ended_at.is_(None))


def _end_lost(session: Session, name: str, server: str, now: datetime) -> None:
    """End the periods in which other servers, which are no longer running, served the model."""
    running, seen = running_ids(session), _last_reports(session)
    for row in session.scalars(select(ServedRow).where(ServedRow.name == name, ServedRow.ended_at.is_(None))):
        if row.server not in {server, *running}:
            row.ended_at, row.ended_by = seen.get(row.server, now), Ended.LOST


def _last_reports(session: Session) -> dict[str, datetime]:
    return {row.id: row.seen_at for row in session.scalars(select(ServerRow))}
