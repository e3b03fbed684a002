"""The servers that use one store, as `svc status` shows them."""

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from svc.store.database import is_sqlite
from svc.store.leases import running_ids
from svc.store.tables import LeaseRow, ServedRow, ServerRow, target_of


@dataclass(frozen=True, slots=True)
class ServerView:
    """A server that uses the store.

    Attributes:
        id: random id of the process.
        address: host name and port.
        seen_at: time of its last report.
        running: whether the last report is recent.
        serves: served versions with their formats, such as `tickets@2 (gptq)`.
        leads: names of the server's leases: model names, and `*` for work that does not belong to a model.
    """

    id: str
    address: str
    started_at: datetime
    seen_at: datetime
    running: bool
    serves: tuple[str, ...]
    leads: tuple[str, ...]


def server_views(store: Store) -> list[ServerView]:
    """Return the servers that use a store, in start order. The result is empty with SQLite.

    A server that stopped reporting is included for a day, unless a new server is running at its address.
    """
    if is_sqlite(store):
        return []
    serves, leads = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    with Session(store) as session:
        running = running_ids(session)
        rows = session.scalars(select(ServerRow).order_by(ServerRow.started_at, ServerRow.id)).all()
        for period in session.scalars(select(ServedRow).where(ServedRow.ended_at.is_(None)).order_by(ServedRow.name)):
            serves[period.server].append(str(target_of(period)))
        for lease in session.scalars(select(LeaseRow).where(LeaseRow.holder.in_(running)).order_by(LeaseRow.name)):
            leads[lease.holder].append(lease.name)
        reporting = {row.address for row in rows if row.id in running}
        return [
            row.read(
                ServerView,
                running=row.id in running,
                serves=tuple(serves[row.id]) if row.id in running else (),
                leads=tuple(leads[row.id]),
            )
            for row in rows
            if row.id in running or row.address not in reporting
        ]
