"""The stored state of rollouts, which are promotions that go through shadow and canary steps.

The server writes the state after every step, so that it can continue the rollout after a restart. `svc promote` and
`svc rollout` read it. If several servers use the store, only the server that holds the model's lease writes the state:
each write names the lease, and is rejected with a LeaseLostError once another server has taken the lease.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, TypeAdapter
from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from svc.errors import BusyError, NotFoundError
from svc.identity.actor import Actor
from svc.settings.rollout import RolloutSettings
from svc.store.audit import Action, AuditEntry, append_event
from svc.store.database import announce_change, exclusive
from svc.store.desired import Desired, write_desired
from svc.store.gate_rows import GATE_ROWS, GateRow, gate_details
from svc.store.leases import Lease, require_lease
from svc.store.tables import (
    DesiredRow,
    RolloutRow,
    RolloutStepRow,
    target_columns,
    target_of,
)
from svc.store.webhooks import add_deliveries
from svc.version import Format, Target, VersionId


class RolloutState(StrEnum):
    """States of a rollout, in the order in which it passes through them."""

    REQUESTED = "requested"
    """The server has not started the rollout yet."""
    LOADING = "loading"
    """The candidate is being loaded next to the production version."""
    SHADOW = "shadow"
    """The candidate answers copies of live or stored production requests; clients never see these answers."""
    CANARY = "canary"
    """The candidate answers the requests of a share of the clients."""
    SWITCHING = "switching"
    """The candidate is becoming the production version."""
    ENDED = "ended"


class RolloutOutcome(StrEnum):
    """Outcome of a rollout. In all cases except `promoted`, the previous version stays in production."""

    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    """The candidate was proven to be worse than a margin allows."""
    UNDECIDED = "undecided"
    """A step reached its deadline without a decision."""
    CANCELLED = "cancelled"
    """A user stopped the rollout by rolling back, or another version was promoted."""
    FAILED = "failed"
    """The candidate could not be loaded, or its engine died."""


@dataclass(frozen=True, slots=True)
class SignalRow:
    """Latest verdict on one signal of a rollout, in the form in which it is stored and shown.

    Attributes:
        outcome: `passed`, `failed` or `undecided`.
        production, candidate: the signal's value for each version; None if there is no data.
        low, high: anytime-valid confidence bounds on how much worse the candidate is; infinite bounds are None.
        margin: how much worse the candidate may be than production.
        units: number of the candidate's users, conversations or requests that contributed to the signal.
    """

    signal: str
    outcome: str
    production: float | None
    candidate: float | None
    low: float | None
    high: float | None
    margin: float
    units: int


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """A rollout, as stored.

    Attributes:
        previous: version that was in production when the rollout was requested.
        generation: generation of the desired state when the rollout was requested.
        plan: the planned shadow and canary steps, with their limits.
        step: index of the current canary step.
        step_began_at: time at which the current state or canary step began.
        stop: reason given by the user who asked to stop the rollout; None if no user has asked to stop it.
        actor, origin: see `svc.identity.actor.Actor`.
        forced: reason for promoting a version that failed a gate; None for any other version.
        why: reason for the outcome.
        gates: results of the gates before the rollout.
        steps: descriptions of the completed steps.
    """

    id: int
    target: Target
    previous: Target
    generation: int
    plan: RolloutSettings
    state: RolloutState
    step: int
    requested_at: datetime
    step_began_at: datetime
    actor: str
    origin: str
    reason: str | None
    forced: str | None
    stop: str | None
    ended_at: datetime | None
    outcome: RolloutOutcome | None
    why: str | None
    signals: tuple[SignalRow, ...]
    gates: tuple[GateRow, ...]
    steps: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.target.version.name


class RolloutView(BaseModel):
    """A rollout as JSON, for the API and `--json`.

    Attributes:
        canary: share of clients that the current canary step sends to the candidate, in percent; None in other states.
        step_began_at: time at which the current state or canary step began.
    """

    model_config = ConfigDict(frozen=True)

    id: int
    version: str
    format: Format
    previous: str
    state: RolloutState
    canary: float | None
    requested_at: datetime
    step_began_at: datetime
    actor: str
    reason: str | None
    forced: str | None
    ended_at: datetime | None
    outcome: RolloutOutcome | None
    why: str | None
    signals: tuple[SignalRow, ...]
    gates: tuple[GateRow, ...] = ()
    steps: tuple[str, ...]

    @classmethod
    def of(cls, record: RolloutRecord) -> Self:
        """Return the JSON view of a rollout record."""
        given = {
            "version": str(record.target.version),
            "format": record.target.format,
            "previous": str(record.previous.version),
            "canary": record.plan.canary[record.step] if record.state is RolloutState.CANARY else None,
        }
        return cls(**given, **{name: getattr(record, name) for name in cls.model_fields.keys() - given.keys()})


_SIGNALS = TypeAdapter(tuple[SignalRow, ...])


def begin_rollout(
    store: Store,
    seen: Desired,
    target: Target,
    plan: RolloutSettings,
    entry: AuditEntry,
    *,
    forced: str | None = None,
    gates: tuple[GateRow, ...] = (),
) -> RolloutRecord:
    """Request a rollout from the server and record it in the audit log.

    Args:
        seen: desired state on which the decision was based; its version stays in production until the rollout ends.

    Raises:
        BusyError: the desired state has changed, or another rollout of the model is in progress.
    """
    now = datetime.now(UTC)
    with exclusive(store) as session:
        row = session.get(DesiredRow, seen.name)
        if row is None or row.generation != seen.generation:
            raise BusyError(
                f"the desired version of {seen.name} was just changed by another user",
                todo="check svc status, then retry",
            )
        if running := _active(session, seen.name):
            raise BusyError(
                f"a rollout of {target_of(running)} is in progress",
                todo=f"wait until the rollout has ended, or stop it: svc rollback {seen.name}",
            )
        new = RolloutRow(
            **target_columns(target),
            previous_number=seen.target.version.number,
            previous_format=seen.target.format,
            generation=seen.generation,
            plan=plan.model_dump_json(),
            state=RolloutState.REQUESTED,
            step=0,
            requested_at=now,
            step_began_at=now,
            actor=entry.actor.name,
            origin=entry.actor.origin,
            reason=entry.reason,
            forced=forced,
            signals="[]",
            gates=GATE_ROWS.dump_json(gates).decode(),
        )
        session.add(new)
        session.flush()
        details = {"rollout": new.id, "format": target.format, "before": str(seen.target), "forced": bool(forced)}
        append_event(session, replace(entry, details=details | gate_details(gates)))
        announce_change(session.connection())
        return _record(session, new)


def active_rollout(store: Store, name: str) -> RolloutRecord | None:
    """Return the model's rollout that is in progress, or None if there is none."""
    with Session(store) as session:
        row = _active(session, name)
        return _record(session, row) if row else None


def find_rollout(store: Store, name: str, rollout: int | None = None) -> RolloutRecord | None:
    """Return a model's rollout with the given id, or its latest rollout if no id is given. The result is None if there
    is no such rollout.
    """
    query = select(RolloutRow).where(RolloutRow.name == name).order_by(RolloutRow.id.desc()).limit(1)
    if rollout is not None:
        query = query.where(RolloutRow.id == rollout)
    with Session(store) as session:
        row = session.scalar(query)
        return _record(session, row) if row else None


def read_rollouts(store: Store, name: str) -> list[RolloutRecord]:
    """Return all rollouts of a model, oldest first."""
    with Session(store) as session:
        rows = session.scalars(select(RolloutRow).where(RolloutRow.name == name).order_by(RolloutRow.id)).all()
        return [_record(session, row) for row in rows]


def stop_rollout(store: Store, name: str, why: str, entry: AuditEntry) -> RolloutRecord | None:
    """Ask the server to stop the model's rollout, and record the request in the audit log.

    Returns:
        The rollout, or None if none is in progress or the candidate is already becoming the production version.
    """
    with exclusive(store) as session:
        row = _active(session, name)
        if row is None or row.state == RolloutState.SWITCHING:
            return None
        row.stop = row.stop or why
        append_event(session, replace(entry, details={"rollout": row.id}))
        announce_change(session.connection())
        session.flush()
        return _record(session, row)


def enter_state(
    store: Store,
    rollout: int,
    state: RolloutState,
    step: int = 0,
    *,
    lease: Lease | None = None,
    webhooks: Collection[str] = (),
) -> RolloutRecord:
    """Record that a rollout has reached a state or canary step, and return the rollout.

    Args:
        lease: lease for the model's rollouts. None if no other server can use the store.
        webhooks: URLs to which a message about the transition is sent. Entering the same state again is not
            reported.

    Raises:
        LeaseLostError: another server leads the rollout now.
    """
    with exclusive(store) as session:
        require_lease(session, lease)
        row = _row(session, rollout)
        announce_change(session.connection())
        _announce_request(session, row, webhooks)
        is_new = (row.state, row.step) != (state, step)
        row.state, row.step, row.step_began_at = state, step, datetime.now(UTC)
        if is_new and state in (RolloutState.SHADOW, RolloutState.CANARY):
            _announce(session, row, webhooks, state, row.step_began_at)
        return _record(session, row)


def switch_rollout(store: Store, record: RolloutRecord, *, lease: Lease | None = None) -> RolloutRecord | None:
    """Make the candidate the desired version, unless a user has stopped the rollout or promoted another version.

    The check and the switch are one transaction. A concurrent rollback therefore takes effect either before
    the switch, or after it like any other rollback.

    Args:
        lease: see `enter_state`.

    Returns:
        The rollout in its new state, or None if the switch is no longer allowed.

    Raises:
        LeaseLostError: another server leads the rollout now.
    """
    entry = AuditEntry(Action.PROMOTE, str(record.target.version), Actor(record.actor, record.origin), record.reason)
    with exclusive(store) as session:
        require_lease(session, lease)
        row, desired = _row(session, record.id), session.get(DesiredRow, record.name)
        if row.stop is not None or desired is None or desired.generation != record.generation:
            return None
        seen = Desired(record.previous, None, record.generation)
        write_desired(
            session, seen, record.target, record.previous, forced=record.forced, entry=entry, gates=record.gates
        )
        row.state, row.step, row.step_began_at = RolloutState.SWITCHING, 0, datetime.now(UTC)
        return _record(session, row)


def store_signals(store: Store, rollout: int, signals: tuple[SignalRow, ...], *, lease: Lease | None = None) -> None:
    """Store the latest signal verdicts of a rollout.

    Args:
        lease: see `enter_state`.

    Raises:
        LeaseLostError: another server leads the rollout now.
    """
    with exclusive(store) as session:
        require_lease(session, lease)
        _row(session, rollout).signals = _SIGNALS.dump_json(signals).decode()


def add_rollout_step(store: Store, rollout: int, text: str) -> None:
    """Add a description of a completed step to a rollout."""
    with Session(store) as session, session.begin():
        session.add(RolloutStepRow(rollout_id=rollout, at=datetime.now(UTC), text=text))


def end_rollout(
    store: Store,
    rollout: int,
    outcome: RolloutOutcome,
    why: str | None,
    *,
    lease: Lease | None = None,
    webhooks: Collection[str] = (),
) -> None:
    """Store the outcome of a rollout.

    Args:
        lease: see `enter_state`.
        webhooks: URLs to which a message about the outcome is sent.

    Raises:
        LeaseLostError: another server leads the rollout now.
    """
    with exclusive(store) as session:
        require_lease(session, lease)
        row = _row(session, rollout)
        announce_change(session.connection())
        _announce_request(session, row, webhooks)
        row.state, row.outcome, row.why, row.ended_at = RolloutState.ENDED, outcome, why, datetime.now(UTC)
        _announce(session, row, webhooks, outcome, row.ended_at)


def _announce_request(session: Session, row: RolloutRow, webhooks: Collection[str]) -> None:
    """Store a webhook message saying that a rollout was requested, if the rollout is about to leave its first
    state.
    """
    if row.state == RolloutState.REQUESTED:
        _announce(session, row, webhooks, RolloutState.REQUESTED, row.requested_at)


def _announce(
    session: Session, row: RolloutRow, webhooks: Collection[str], what: RolloutState | RolloutOutcome, at: datetime
) -> None:
    """Store a webhook message in the same transaction as the transition that it reports.

    The rollout's steps are omitted because of their size.
    """
    if webhooks:
        data = RolloutView.of(_record(session, row)).model_dump(mode="json", exclude={"steps"})
        message = {"type": f"rollout.{what}", "timestamp": at.isoformat(), "data": data}
        add_deliveries(session, webhooks, json.dumps(message, separators=(",", ":")))


def _active(session: Session, name: str) -> RolloutRow | None:
    query = select(RolloutRow).where(RolloutRow.name == name, RolloutRow.state != RolloutState.ENDED)
    return session.scalar(query.order_by(RolloutRow.id.desc()).limit(1))


def _row(session: Session, rollout: int) -> RolloutRow:
    row = session.get(RolloutRow, rollout)
    if row is None:
        raise NotFoundError(f"there is no rollout {rollout}")
    return row


def _record(session: Session, row: RolloutRow) -> RolloutRecord:
    session.flush()
    steps = session.scalars(
        select(RolloutStepRow.text).where(RolloutStepRow.rollout_id == row.id).order_by(RolloutStepRow.id)
    )
    return row.read(
        RolloutRecord,
        target=target_of(row),
        previous=Target(VersionId(row.name, row.previous_number), Format(row.previous_format)),
        plan=RolloutSettings.model_validate_json(row.plan),
        signals=_SIGNALS.validate_json(row.signals),
        gates=GATE_ROWS.validate_json(row.gates),
        steps=tuple(steps),
    )
