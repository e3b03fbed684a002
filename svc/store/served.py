"""Which version served under a name, and from when to when. The server writes it, `svc history` shows it."""

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
    """Why a version began to serve."""

    START = "start"
    """A server started an engine with it."""
    ADOPTED = "adopted"
    """A server started, and its engine was running already."""
    SWAP = "swap"
    """It was promoted."""


class Ended(StrEnum):
    """Why it ended."""

    SWAP = "swap"
    """Another version took its place."""
    STOP = "stop"
    """The server was stopped, or serves the model no more."""
    LOST = "lost"
    """The server died; the end is when the next one began, at the latest."""


@dataclass(frozen=True, slots=True)
class ServedSpan:
    """A time in which a version served.

    Attributes:
        generation: of the desired state that it came with.
        ended_at: None while it lasts, or where its server has died and none came after.
    """

    target: Target
    generation: int
    began_at: datetime
    began_by: Began
    ended_at: datetime | None
    ended_by: Ended | None


def begin_serving(store: Store, desired: Desired, began_by: Began, at: datetime | None = None) -> None:
    """Writes that a version serves from now on; after a swap that left the version which served, nothing.

    Args:
        at: when it began; default: now.
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
    """Writes that nothing serves under a name any more."""
    with exclusive(store) as session:
        for row in session.scalars(_lasting(name)):
            row.ended_at, row.ended_by = at or datetime.now(UTC), Ended.STOP


def served_spans(store: Store, name: str) -> list[ServedSpan]:
    """All times of a name, in order."""
    query = select(ServedRow).where(ServedRow.name == name).order_by(ServedRow.id)
    with Session(store) as session:
        return [row.read(ServedSpan, target=target_of(row)) for row in session.scalars(query)]


def _lasting(name: str) -> Select[ServedRow]:
    return select(ServedRow).where(ServedRow.name == name, ServedRow.ended_at.is_(None))
