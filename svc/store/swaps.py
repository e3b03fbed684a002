"""The journal of swaps. In a swap, a server replaces the version that it serves.

The server writes the journal, `svc promote` follows it, and `svc status` shows its last entry.
"""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy import Select, select, update
from sqlalchemy.orm import Session

from svc.store.database import exclusive, is_sqlite
from svc.store.desired import Desired
from svc.store.leases import running_ids
from svc.store.tables import ServedRow, ServerRow, SwapRow, SwapStepRow, is_of, target_columns, target_of
from svc.version import Target


class SwapOutcome(StrEnum):
    """Outcome of a swap."""

    SUCCEEDED = "succeeded"
    REFUSED = "refused"
    """A check failed before the engine was changed, so the swap was rejected."""
    RESTORED = "restored"
    """A check failed after the load, so the previous version was loaded again and verified."""
    CANCELLED = "cancelled"
    """The swap was cancelled because the desired version changed. The previous version stays in service until
    the newly desired version is loaded."""
    FAILED = "failed"
    """The swap failed because the engine died or because only a new engine could restore the previous version."""


_FAILURES = {SwapOutcome.REFUSED, SwapOutcome.RESTORED, SwapOutcome.FAILED}


class SwapKind(StrEnum):
    """Method by which a swap loads the version into the engines."""

    INPLACE = "inplace"
    """Reload the weights of the only engine while requests wait in the queue."""
    BLUEGREEN = "bluegreen"
    """Start a second engine, which then replaces the first engine."""
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
        queued: maximum number of requests waiting at the same time, or None if no request had to wait.
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


@dataclass(frozen=True, slots=True)
class ServerSwap:
    """One server's progress in swapping to the version in a desired state.

    Attributes:
        server: id of the server; empty if no other server can use the store.
        address: host name and port of the server; empty if it is unknown.
        running: whether the server has reported recently.
        swap: the server's swap to the version, or None if the server has not begun it.
        later: target of the server's last swap for a later desired state, or None if there is no such swap. Once
            `later` is set, the server will not begin the swap to the version.
    """

    server: str
    address: str
    running: bool
    swap: SwapRecord | None
    later: Target | None


def begin_swap(store: Store, desired: Desired, *, server: str = "") -> int:
    """Record the start of a swap and return its id. If the server has an unfinished swap to the same desired state,
    return the id of that swap instead.

    Args:
        server: id of the server; empty if no other server can use the store.
    """
    last = _last_swap(desired.name, desired.generation, server)
    row = SwapRow(
        **target_columns(desired.target), server=server, generation=desired.generation, started_at=datetime.now(UTC)
    )
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
    """Return how long requests were queued in the last in-place swap to a version, in seconds, or None if there was no
    such swap.
    """
    row = SwapRow
    query = select(row.queued_s).where(row.kind == SwapKind.INPLACE, row.outcome == SwapOutcome.SUCCEEDED)
    query = query.where(is_of(row, target))
    with Session(store) as session:
        return session.scalar(query.order_by(row.id.desc()).limit(1))


def end_lost_swaps(store: Store, started: Desired, address: str, result: SwapResult, reason: str) -> None:
    """Record the results of a model's unfinished swaps on servers that are no longer running.

    Args:
        started: desired state with which this server started.
        address: address of this server. An earlier server at this address counts as an earlier run of this server.
        result: result to record for a swap to that state by an earlier run of this server. All other swaps are
            recorded as failed.
        reason: why the other swaps failed.
    """
    unfinished = select(SwapRow).where(SwapRow.name == started.name, SwapRow.outcome.is_(None))
    with exclusive(store) as session:
        running = running_ids(session)
        before = set(session.scalars(select(ServerRow.id).where(ServerRow.address == address)))
        for row in session.scalars(unfinished).all():
            if row.server in running:
                continue
            row.outcome, row.reason = SwapOutcome.FAILED, reason
            if row.server in before and row.generation == started.generation:
                row.outcome, row.reason = result.outcome, result.reason
                step = f"the server started again with {started.target}"
                session.add(SwapStepRow(swap_id=row.id, at=datetime.now(UTC), text=step))


def find_swap(store: Store, name: str, generation: int | None = None, *, server: str = "") -> SwapRecord | None:
    """Return a model's last swap on a server.

    Args:
        generation: generation of the desired state that the swap was to reach; None allows any.
        server: id of the server; empty if no other server can use the store.
    """
    with Session(store) as session:
        row = session.scalar(_last_swap(name, generation, server))
        return _read(session, row) if row else None


def last_swap(store: Store, name: str, *, server: str) -> SwapRecord | None:
    """Return a model's last swap on a server. If the server has not begun a swap since it started, return the last
    swap on a server that is no longer running, which may have been an earlier run of this server.

    Args:
        server: id of the server; empty if no other server can use the store.
    """
    with Session(store) as session:
        row = session.scalar(_last_swap(name, None, server))
        if row is None and server:
            lost = select(SwapRow).where(SwapRow.name == name, SwapRow.server.not_in(running_ids(session)))
            row = session.scalar(lost.order_by(SwapRow.id.desc()).limit(1))
        return _read(session, row) if row else None


def unfinished_swaps(store: Store, name: str) -> list[SwapRecord]:
    """Return a model's unfinished swaps on servers that are still running."""
    with Session(store) as session:
        servers = {""} if is_sqlite(store) else running_ids(session)
        last = [session.scalar(_last_swap(name, None, server)) for server in sorted(servers)]
        return [_read(session, row) for row in last if row is not None and row.outcome is None]


def server_swaps(store: Store, name: str, generation: int) -> list[ServerSwap]:
    """Return each server's progress in swapping to the version in a desired state, in the servers' start order.

    Servers that started with the version are left out, because they do not have to swap.
    """
    if is_sqlite(store):
        newest = find_swap(store, name)
        later = newest.target if newest and newest.generation > generation else None
        return [ServerSwap("", "", True, find_swap(store, name, generation), later)]
    earlier = select(ServedRow.server).where(
        ServedRow.name == name, ServedRow.ended_at.is_(None), ServedRow.generation < generation
    )
    began = select(SwapRow.server).where(SwapRow.name == name, SwapRow.generation == generation)
    with Session(store) as session:
        running, swapped = running_ids(session), set(session.scalars(began))
        concerned = swapped | (set(session.scalars(earlier)) & running)
        known = session.scalars(select(ServerRow).order_by(ServerRow.started_at, ServerRow.id))
        addresses = {row.id: row.address for row in known if row.id in concerned}
        addresses |= dict.fromkeys(sorted(concerned - addresses.keys()), "")
        swaps = []
        for server, address in addresses.items():
            row = session.scalar(_last_swap(name, generation, server))
            last = session.scalar(_last_swap(name, None, server))
            later = target_of(last) if last and last.generation > generation else None
            swaps.append(ServerSwap(server, address, server in running, _read(session, row) if row else None, later))
        return swaps


def failed_elsewhere(store: Store, target: Target, *, server: str) -> bool:
    """Return whether the last swap to a version failed on another running server.

    Args:
        server: id of this server; empty if no other server can use the store.
    """
    if not server:
        return False
    with Session(store) as session:
        for other in running_ids(session) - {server}:
            swap = session.scalar(_last_swap(target.version.name, None, other).where(is_of(SwapRow, target)))
            if swap is not None and swap.outcome in _FAILURES:
                return True
    return False


def _read(session: Session, row: SwapRow) -> SwapRecord:
    steps = session.scalars(select(SwapStepRow.text).where(SwapStepRow.swap_id == row.id).order_by(SwapStepRow.id))
    result = row.read(SwapResult) if row.outcome else None
    return row.read(SwapRecord, target=target_of(row), result=result, steps=tuple(steps))


def _last_swap(name: str, generation: int | None, server: str) -> Select[SwapRow]:
    query = select(SwapRow).where(SwapRow.name == name, SwapRow.server == server).order_by(SwapRow.id.desc()).limit(1)
    return query if generation is None else query.where(SwapRow.generation == generation)
