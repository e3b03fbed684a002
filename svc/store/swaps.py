"""The journal of swaps. The server writes it, `svc promote` follows it, and `svc status` shows its last
entry.
"""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy import Select, select, update
from sqlalchemy.orm import Session

from svc.store.database import exclusive
from svc.store.desired import Desired
from svc.store.tables import SwapRow, SwapStepRow, target_columns, target_of
from svc.version import Target


class SwapOutcome(StrEnum):
    """Outcome of a swap."""

    SUCCEEDED = "succeeded"
    REFUSED = "refused"
    """A check failed before the engine was changed, so the swap was rejected."""
    RESTORED = "restored"
    """A check failed after the load, so the previous version was loaded again and verified by its probes."""
    CANCELLED = "cancelled"
    """The swap was cancelled because the desired version changed. The previous version stays in service until
    the newly desired one is loaded."""
    FAILED = "failed"
    """The swap failed because the engine died or because only a new engine could restore the previous version."""


class SwapKind(StrEnum):
    """How a swap loads the version into the engines."""

    INPLACE = "inplace"
    """Reload the weights of the only engine while requests wait in the queue."""
    BLUEGREEN = "bluegreen"
    """Start a second engine that replaces the first."""
    ROLLING = "rolling"
    """Reload the engines in place one at a time, while the other engines keep answering."""
    ADAPTER = "adapter"
    """Load another adapter for the base that the engines already serve. No request has to wait."""


@dataclass(frozen=True, slots=True)
class SwapResult:
    """Result of a swap.

    Attributes:
        reason: why the swap failed.
        queued_s: time for which admission was closed, in seconds, or None if no request had to wait.
        running: number of requests in the engines when the swap started.
        queued: maximum number of requests waiting at once, or None if no request had to wait.
        kind: method of the swap, or None if the swap was rejected before the method was known.
        took_s: time from the first check to the end of the swap, in seconds.
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
    """One swap as recorded in the journal.

    Attributes:
        result: result of the swap, or None while it is running.
        steps: descriptions of the steps completed so far.
    """

    id: int
    target: Target
    generation: int
    started_at: datetime
    result: SwapResult | None
    steps: tuple[str, ...]


def begin_swap(store: Store, desired: Desired) -> int:
    """Record the start of a swap and return its id. An unfinished swap for the same desired state is resumed."""
    last = _last_swap(desired.name, desired.generation)
    row = SwapRow(**target_columns(desired.target), generation=desired.generation, started_at=datetime.now(UTC))
    with exclusive(store) as session:
        before = session.scalar(last)
        if before is not None and before.outcome is None:
            return before.id
        session.add(row)
        session.flush()
        return row.id


def add_step(store: Store, swap_id: int, text: str) -> None:
    """Record a completed step of a swap."""
    with Session(store) as session, session.begin():
        session.add(SwapStepRow(swap_id=swap_id, at=datetime.now(UTC), text=text))


def end_swap(store: Store, swap_id: int, result: SwapResult) -> None:
    """Record the final result of a swap."""
    with store.begin() as connection:
        connection.execute(update(SwapRow).where(SwapRow.id == swap_id).values(**asdict(result)))


def last_queued_s(store: Store, target: Target) -> float | None:
    """Return for how long requests were queued in the last in-place swap to a version, or None if there was none."""
    row = SwapRow
    query = select(row.queued_s).where(row.kind == SwapKind.INPLACE, row.outcome == SwapOutcome.SUCCEEDED)
    query = query.where(*(getattr(row, name) == value for name, value in target_columns(target).items()))
    with Session(store) as session:
        return session.scalar(query.order_by(row.id.desc()).limit(1))


def find_swap(store: Store, name: str, generation: int | None = None) -> SwapRecord | None:
    """Return a model's last swap, or its last swap for a given generation of the desired state."""
    with Session(store) as session:
        row = session.scalar(_last_swap(name, generation))
        if row is None:
            return None
        steps = session.scalars(select(SwapStepRow.text).where(SwapStepRow.swap_id == row.id).order_by(SwapStepRow.id))
        result = row.read(SwapResult) if row.outcome else None
        return row.read(SwapRecord, target=target_of(row), result=result, steps=tuple(steps))


def _last_swap(name: str, generation: int | None) -> Select[SwapRow]:
    query = select(SwapRow).where(SwapRow.name == name).order_by(SwapRow.id.desc()).limit(1)
    return query if generation is None else query.where(SwapRow.generation == generation)
