"""Periods in which a model's versions were served, recorded by the server and shown by `svc history`."""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from svc.store.database import exclusive
from svc.store.desired import Desired
from svc.store.leases import running_servers
from svc.store.tables import ServedRow, target_columns, target_of
from svc.version import Target


class Began(StrEnum):
    """Event that started a serving period."""

    START = "start"
    """Serving began because a server started an engine with the version."""
    ADOPTED = "adopted"
    """Serving began because a server started and adopted a running engine with the version."""
    SWAP = "swap"
    """Serving began because the version was promoted."""


class Ended(StrEnum):
    """Event that ended a serving period."""

    SWAP = "swap"
    """Serving ended because another version replaced it."""
    STOP = "stop"
    """Serving ended because the server was stopped or the model was removed from it."""
    LOST = "lost"
    """Serving ended because the server died. The recorded end is an upper bound: the next server's start."""


@dataclass(frozen=True, slots=True)
class ServedSpan:
    """A period in which a version was served.

    Attributes:
        generation: generation of the desired state.
        ended_at: end of the period. None if the period has not ended, or if the server died and no server
            has started since.
    """

    target: Target
    generation: int
    began_at: datetime
    began_by: Began
    ended_at: datetime | None
    ended_by: Ended | None


def begin_serving(store: Store, desired: Desired, began_by: Began, at: datetime | None = None) -> None:
    """Record that a version has started being served. Does nothing if it is already being served.

    Args:
        at: time of the start, or None for now.
    """
    now = at or datetime.now(UTC)
    with exclusive(store) as session:
        for row in session.scalars(_lasting(desired.name)):
            if began_by is Began.SWAP and target_of(row) == desired.target:
                return
            row.ended_at = now
            row.ended_by = Ended.SWAP if began_by is Began.SWAP else Ended.LOST
        session.add(
            ServedRow(**target_columns(desired.target), generation=desired.generation, began_at=now, began_by=began_by)
        )


def end_serving(store: Store, name: str, at: datetime | None = None) -> None:
    """Record that a model is no longer being served."""
    with exclusive(store) as session:
        for row in session.scalars(_lasting(name)):
            row.ended_at, row.ended_by = at or datetime.now(UTC), Ended.STOP


def is_served_elsewhere(store: Store, name: str, server: str) -> bool:
    """Return whether a running server other than the given one serves a model.

    Args:
        server: id of the server; empty if no other one can use the store.
    """
    if not server:
        return False
    with Session(store) as session:
        holders = set(session.scalars(_lasting(name).with_only_columns(ServedRow.server)))
    return bool(holders & {each.id for each in running_servers(store)} - {server})


def served_spans(store: Store, name: str) -> list[ServedSpan]:
    """Return all serving periods of a model, oldest first."""
    query = select(ServedRow).where(ServedRow.name == name).order_by(ServedRow.id)
    with Session(store) as session:
        return [row.read(ServedSpan, target=target_of(row)) for row in session.scalars(query)]


def _lasting(name: str) -> Select[ServedRow]:
    return select(ServedRow).where(ServedRow.name == name, ServedRow.ended_at.is_(None))
