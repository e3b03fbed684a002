"""Servers that share one store, and leases for the work that only one of them may do.

Every server reports regularly that it is running. With each report, it extends its own leases and takes any others that
are free or have expired. All decisions use the database's clock, so the servers' clocks need not agree.

A server that lost its connection may still believe that it holds a lease. Its writes therefore contain the lease's
generation (`require_lease`). Once another server has taken the lease, the generation has changed and these writes are
rejected.
"""

import logging
import os
import platform
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from sqlalchemy import Engine as Store
from sqlalchemy import delete, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from svc.errors import BusyError
from svc.store.database import exclusive, is_sqlite
from svc.store.outage_log import log_store_error
from svc.store.tables import LeaseRow, ServerRow

log = logging.getLogger(__name__)

LEASE_S = 15.0
"""Seconds after which a lease expires unless it is extended. A server that has not reported for this long is considered
stopped."""
_FORGOTTEN = timedelta(days=1)


class LeaseLostError(Exception):
    """Raised when a write is based on a lease that another server has since taken."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A server's exclusive right to do some work, until the lease expires.

    Attributes:
        name: the work that the lease covers, for example a model's rollouts.
        holder: id of the server.
        generation: number that increases when another server takes the lease.
    """

    name: str
    holder: str
    generation: int


def report_server(store: Store, server: str, address: str, names: Collection[str]) -> dict[str, Lease]:
    """Record that a server is running, extend its leases, and take any other requested leases that are free or expired.

    When a server first reports, an earlier server with the same address counts as stopped, because only one server can
    listen at an address.

    Args:
        address: host name and port of the server.
        names: names of the leases that the server wants to hold.

    Returns:
        The leases that the server now holds for `LEASE_S`, by name.
    """
    with exclusive(store) as session:
        now = database_time(session)
        session.execute(delete(ServerRow).where(ServerRow.seen_at < now - _FORGOTTEN))
        row = session.get(ServerRow, server)
        if row is None:
            for earlier in session.scalars(select(ServerRow).where(ServerRow.address == address)):
                earlier.seen_at = min(earlier.seen_at, now - timedelta(seconds=LEASE_S))
                _end_leases(session, earlier.id, now)
            session.add(ServerRow(id=server, address=address, started_at=now, seen_at=now))
        else:
            row.seen_at = now
        return {name: lease for name in names if (lease := _take(session, name, server, now)) is not None}


def remove_server(store: Store, server: str) -> None:
    """Record that a server has stopped. Others can take its leases immediately."""
    with exclusive(store) as session:
        now = database_time(session)
        session.execute(delete(ServerRow).where(ServerRow.id == server))
        _end_leases(session, server, now)


def database_time(session: Session) -> datetime:
    """Return the current time by the database's clock."""
    if session.connection().dialect.name == "sqlite":
        return datetime.now(UTC)
    now: datetime = session.scalar(select(func.clock_timestamp()))  # type: ignore[assignment]
    return now


def _end_leases(session: Session, holder: str, now: datetime) -> None:
    for row in session.scalars(select(LeaseRow).where(LeaseRow.holder == holder)):
        row.until = now


def running_servers(store: Store) -> dict[str, str]:
    """Return the host name and port of each server that has reported within the last `LEASE_S`, keyed by the random id
    of its process, in start order. The result is empty with SQLite.
    """
    with Session(store) as session:
        running = running_ids(session)
        query = select(ServerRow).where(ServerRow.id.in_(running)).order_by(ServerRow.started_at, ServerRow.id)
        return {row.id: row.address for row in session.scalars(query)}


def running_ids(session: Session) -> set[str]:
    """Return the ids of the servers that have reported within the last `LEASE_S`. The result is empty with SQLite."""
    recent = ServerRow.seen_at > database_time(session) - timedelta(seconds=LEASE_S)
    return set(session.scalars(select(ServerRow.id).where(recent)))


def require_lease(session: Session, lease: Lease | None) -> None:
    """Check in an `exclusive` transaction that a lease has not been taken by another server.

    Args:
        lease: None if no other server can use the store, as with SQLite.

    Raises:
        LeaseLostError: another server has taken the lease.
    """
    if lease is None:
        return
    row = session.get(LeaseRow, lease.name)
    if row is None or (row.holder, row.generation) != (lease.holder, lease.generation):
        raise LeaseLostError(f"another server has taken over {lease.name}")


@contextmanager
def hold_lease(store: Store, name: str, what: str) -> Iterator[Lease | None]:
    """Hold a lease during the `with` block, in a process that is not a server. A background thread extends the lease.

    With SQLite, no lease is written and None is yielded, because the processes that share a home folder use a lock file
    instead.

    Args:
        name: name of the lease.
        what: noun for the work that the lease covers, used in error messages.

    Raises:
        BusyError: another process holds the lease, or has taken it because the store did not respond for `LEASE_S`.
    """
    if is_sqlite(store):
        yield None
        return
    holder = f"process {os.getpid()} on {platform.node()}{_UNIQUE}{uuid4().hex}"
    with exclusive(store) as session:
        lease = _take(session, name, holder, database_time(session))
        if lease is None:
            other = session.get_one(LeaseRow, name).holder.partition(_UNIQUE)[0]
            raise BusyError(f"{what} is in use by {other}", todo="wait for that process, or stop it")
    released = threading.Event()
    extending = threading.Thread(target=_extend, args=(store, lease, released), name=f"lease {name}", daemon=True)
    extending.start()
    try:
        yield lease
    except LeaseLostError as error:
        raise BusyError(f"another process took over {what}, because the store did not respond in time") from error
    finally:
        released.set()
        extending.join()
        _release(store, lease)


_UNIQUE = "#"


def _extend(store: Store, lease: Lease, released: threading.Event) -> None:
    """Keep extending a lease until it is released or lost."""
    while not released.wait(LEASE_S / 3):
        try:
            with exclusive(store) as session:
                require_lease(session, lease)
                _take(session, lease.name, lease.holder, database_time(session))
        except LeaseLostError:
            return
        except SQLAlchemyError:
            log_store_error(log, "could not extend lease %s", lease.name)


def _release(store: Store, lease: Lease) -> None:
    """Release a lease, so that others can take it immediately."""
    try:
        with exclusive(store) as session:
            row = session.get(LeaseRow, lease.name)
            if row is not None and row.holder == lease.holder:
                row.until = database_time(session)
    except SQLAlchemyError:
        log_store_error(log, "could not release lease %s; it expires in %.0f s", lease.name, LEASE_S)


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
