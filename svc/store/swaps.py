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
    """Outcome of a swap."""

    SUCCEEDED = "succeeded"
    REFUSED = "refused"
    """Rejected: a check failed before the engine was changed."""
    RESTORED = "restored"
    """A check failed after the load; the previous version was loaded again and verified by its probes."""
    CANCELLED = "cancelled"
    """The desired version changed during the swap; the previous version is served until the new one is loaded."""
    FAILED = "failed"
    """The engine died, or the previous version could be restored only by a new engine."""


class SwapKind(StrEnum):
    """Method by which a swap loads the version into the engines."""

    INPLACE = "inplace"
    """Reload weights in the only engine; requests are queued meanwhile."""
    BLUEGREEN = "bluegreen"
    """A second engine replaces the first."""
    ROLLING = "rolling"
    """Reload the engines in place one at a time; the others answer meanwhile."""
    ADAPTER = "adapter"
    """Load another adapter of the base that the engines serve; no request waits."""


@dataclass(frozen=True, slots=True)
class SwapResult:
    """Result of a swap.

    Attributes:
        reason: reason for the failure.
        queued_s: time for which admission was closed, seconds; None if no request had to wait.
        running: number of requests in the engines at the swap's start.
        queued: maximum number of requests that waited concurrently; None if no request had to wait.
        kind: method of the swap; None if the swap was rejected before the method was known.
        took_s: time from the first check to the end, seconds.
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
        result: result of the swap; None while it is running.
        steps: texts of the steps completed so far.
    """

    id: int
    target: Target
    generation: int
    started_at: datetime
    result: SwapResult | None
    steps: tuple[str, ...]


def begin_swap(store: Store, desired: Desired) -> int:
    """Record the start of a swap; return its id. An unfinished swap for the same desired state is resumed."""
    last = find_swap(store, desired.name, desired.generation)
    if last is not None and last.result is None:
        return last.id
    row = SwapRow(**target_columns(desired.target), generation=desired.generation, started_at=datetime.now(UTC))
    with Session(store) as session, session.begin():
        session.add(row)
        session.flush()
        return row.id


def add_step(store: Store, swap_id: int, text: str) -> None:
    """Record a step of a swap."""
    with Session(store) as session, session.begin():
        session.add(SwapStepRow(swap_id=swap_id, at=datetime.now(UTC), text=text))


def end_swap(store: Store, swap_id: int, result: SwapResult) -> None:
    """Record the result of a swap."""
    with store.begin() as connection:
        connection.execute(update(SwapRow).where(SwapRow.id == swap_id).values(**asdict(result)))


def find_swap(store: Store, name: str, generation: int | None = None) -> SwapRecord | None:
    """Return the last swap of a name, or the last one for a generation of its desired state."""
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
