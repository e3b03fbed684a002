"""Servers that use one store together, and the leases that say which of them does what only one may do.

Every server reports regularly that it is running. With each report it extends its leases and takes those that have
ended. All times are the database's, so the servers' clocks need not agree.

A server that was cut off may still believe that it holds a lease. Its writes therefore name the lease
(`require_lease`): once another server has taken it, its generation has changed and they are rejected.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine as Store
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from svc.store.database import exclusive
from svc.store.tables import LeaseRow, ServerRow

LEASE_S = 15.0
"""Seconds for which a lease lasts without being extended, and a server counts as running without reporting."""
_FORGOTTEN = timedelta(days=1)


class LeaseLostError(Exception):
    """Raised when a write names a lease that another server has taken meanwhile."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A server's right to do what only one server may do, until it ends.

    Attributes:
        name: what it is for, for example a model's rollouts.
        holder: id of the server.
        generation: number that increases when another server takes the lease.
    """

    name: str
    holder: str
    generation: int


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """A server that uses the store.

    Attributes:
        id: random id of the process.
        address: host name and port that it listens on.
    """

    id: str
    address: str
    started_at: datetime
    seen_at: datetime


def report_server(store: Store, server: str, address: str, names: Collection[str]) -> dict[str, Lease]:
    """Record that a server is running, extend its leases, and take those that have ended or were never taken.

    Args:
        names: leases that the server wants.

    Returns:
        The leases that the server now holds for `LEASE_S`, by name.
    """
    with exclusive(store) as session:
        now = _now(session)
        session.execute(delete(ServerRow).where(ServerRow.seen_at < now - _FORGOTTEN))
        row = session.get(ServerRow, server)
        if row is None:
            session.add(ServerRow(id=server, address=address, started_at=now, seen_at=now))
        else:
            row.seen_at = now
        return {name: lease for name in names if (lease := _take(session, name, server, now)) is not None}


def remove_server(store: Store, server: str) -> None:
    """Record that a server has stopped. Others can take its leases immediately."""
    with exclusive(store) as session:
        now = _now(session)
        session.execute(delete(ServerRow).where(ServerRow.id == server))
        for row in session.scalars(select(LeaseRow).where(LeaseRow.holder == server)):
            row.until = now


def running_servers(store: Store) -> list[ServerRecord]:
    """Return the servers that have reported within the last `LEASE_S`, in the order of their start."""
    with Session(store) as session:
        running = running_ids(session)
        query = select(ServerRow).where(ServerRow.id.in_(running)).order_by(ServerRow.started_at, ServerRow.id)
        return [row.read(ServerRecord) for row in session.scalars(query)]


def running_ids(session: Session) -> set[str]:
    """Return the ids of the servers that have reported within the last `LEASE_S`. With SQLite, there are none."""
    recent = ServerRow.seen_at > _now(session) - timedelta(seconds=LEASE_S)
    return set(session.scalars(select(ServerRow.id).where(recent)))


def require_lease(session: Session, lease: Lease | None) -> None:
    """Check in an `exclusive` transaction that no other server has taken a lease.

    Args:
        lease: None if no other server can use the store, as with SQLite.

    Raises:
        LeaseLostError: another server has taken it.
    """
    if lease is None:
        return
    row = session.get(LeaseRow, lease.name)
    if row is None or (row.holder, row.generation) != (lease.holder, lease.generation):
        raise LeaseLostError(f"another server has taken over {lease.name}")


def _take(session: Session, name: str, server: str, now: datetime) -> Lease | None:
    row = session.get(LeaseRow, name)
    if row is None:
        row = LeaseRow(name=name, holder=server, generation=1, until=now)
        session.add(row)
    elif row.holder != server:
        if row.until > now:
            return None
        row.holder, row.generation = server, row.generation + 1
    row.until = now + timedelta(seconds=LEASE_S)
    return Lease(name, server, row.generation)


def _now(session: Session) -> datetime:
    """Return the database's time."""
    if session.connection().dialect.name == "sqlite":
        return datetime.now(UTC)
    now: datetime = session.scalar(select(func.clock_timestamp()))  # type: ignore[assignment]
    return now
