"""Periods in which versions were served under a name. The server writes them; `svc history` shows them."""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from svc.store.database import exclusive
from svc.store.desired import Desired
from svc.store.tables import ServedRow, target_columns, target_of
from svc.version import Target


class Began(StrEnum):
    """Event that started a period."""

    START = "start"
    """A server started an engine with the version."""
    ADOPTED = "adopted"
    """A server started and adopted a running engine with the version."""
    SWAP = "swap"
    """The version was promoted."""


class Ended(StrEnum):
    """Event that ended a period."""

    SWAP = "swap"
    """Another version replaced it."""
    STOP = "stop"
    """The server was stopped, or the model was removed from it."""
    LOST = "lost"
    """The server died; the recorded end is the next server's start, an upper bound."""


@dataclass(frozen=True, slots=True)
class ServedSpan:
    """A period in which a version was served.

    Attributes:
        generation: generation of the desired state.
        ended_at: end of the period; None if it has not ended, or if the server died and none was started since.
    """

    target: Target
    generation: int
    began_at: datetime
    began_by: Began
    ended_at: datetime | None
    ended_by: Ended | None


def begin_serving(store: Store, desired: Desired, began_by: Began, at: datetime | None = None) -> None:
    """Record the start of serving a version; changes nothing if the version is already being served.

    Args:
        at: time of the start; None: now.
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
    """Record the end of serving a name."""
    with exclusive(store) as session:
        for row in session.scalars(_lasting(name)):
            row.ended_at, row.ended_by = at or datetime.now(UTC), Ended.STOP


def served_spans(store: Store, name: str) -> list[ServedSpan]:
    """Return all periods of a name, in order."""
    query = select(ServedRow).where(ServedRow.name == name).order_by(ServedRow.id)
    with Session(store) as session:
        return [row.read(ServedSpan, target=target_of(row)) for row in session.scalars(query)]


def _lasting(name: str) -> Select[ServedRow]:
    return select(ServedRow).where(ServedRow.name == name, ServedRow.ended_at.is_(None))
