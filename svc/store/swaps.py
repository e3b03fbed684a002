"""The journal of swaps: the server writes it, `svc promote` follows it, `svc status` shows the last one."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from svc.store.desired import Desired
from svc.store.tables import SwapRow, SwapStepRow, target_columns, target_of
from svc.version import Target


class SwapOutcome(StrEnum):
    """How a swap ended."""

    SUCCEEDED = "succeeded"
    REFUSED = "refused"
    """Found unfit before the engine was touched."""
    RESTORED = "restored"
    """Found unfit after the load; the version before is back, and its probes were right."""
    CANCELLED = "cancelled"
    """Another version was wanted meanwhile; the version before serves until that comes."""
    FAILED = "failed"
    """The engine died, or the version before could be brought back only by a new one."""


class SwapKind(StrEnum):
    """How the version comes into the engines."""

    INPLACE = "inplace"
    """Other weights in the only engine; requests wait meanwhile."""
    BLUEGREEN = "bluegreen"
    """A second engine takes the place of the first."""
    ROLLING = "rolling"
    """In place, one engine after the other; the others answer meanwhile."""
    ADAPTER = "adapter"
    """Another adapter beside the base that the engines hold; nobody waits."""


@dataclass(frozen=True, slots=True)
class SwapResult:
    """How a swap went.

    Attributes:
        reason: why it did not succeed.
        queued_s: how long admission was closed, seconds; None where no request had to wait.
        running: requests in the engines when it began.
        queued: most requests that waited at once; None where none had to.
        kind: None where it was refused before that was known.
        took_s: from the first check to the end, seconds.
    """

    outcome: SwapOutcome
    reason: str | None = None
    queued_s: float | None = None
    running: int | None = None
    queued: int | None = None
    kind: SwapKind | None = None
    took_s: float | None = None


@dataclass(frozen=True, slots=True)
class SwapRecord:
    """One swap.

    Attributes:
        result: None while it is under way.
        steps: what was done so far.
    """

    id: int
    target: Target
    generation: int
    started_at: datetime
    result: SwapResult | None
    steps: tuple[str, ...]


def begin_swap(store: Store, desired: Desired) -> int:
    """Writes that a swap has begun; returns its id. One that a server left open for the same wish goes on."""
    last = find_swap(store, desired.name, desired.generation)
    if last is not None and last.result is None:
        return last.id
    row = SwapRow(**target_columns(desired.target), generation=desired.generation, started_at=datetime.now(UTC))
    with Session(store) as session, session.begin():
        session.add(row)
        session.flush()
        return row.id


def add_step(store: Store, swap_id: int, text: str) -> None:
    """Adds a step to a swap."""
    with Session(store) as session, session.begin():
        session.add(SwapStepRow(swap_id=swap_id, at=datetime.now(UTC), text=text))


def end_swap(store: Store, swap_id: int, result: SwapResult) -> None:
    """Writes how a swap ended."""
    with store.begin() as connection:
        connection.execute(update(SwapRow).where(SwapRow.id == swap_id).values(**asdict(result)))


def find_swap(store: Store, name: str, generation: int | None = None) -> SwapRecord | None:
    """The last swap of a name, or the last one for a generation of its desired state."""
    query = select(SwapRow).where(SwapRow.name == name).order_by(SwapRow.id.desc()).limit(1)
    if generation is not None:
        query = query.where(SwapRow.generation == generation)
    with Session(store) as session:
        row = session.scalar(query)
        if row is None:
            return None
        steps = session.scalars(select(SwapStepRow.text).where(SwapStepRow.swap_id == row.id).order_by(SwapStepRow.id))
        result = row.read(SwapResult) if row.outcome else None
        return row.read(SwapRecord, target=target_of(row), result=result, steps=tuple(steps))
