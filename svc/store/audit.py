"""The audit log: who did what, when, from where and why. It is append-only, and each row's hash covers the
previous row's hash, so that changed, removed or inserted rows are detected.

Database triggers reject changes. A user who can drop the triggers can also recompute all later hashes or delete the
newest rows; such tampering can be detected with a copy of an earlier hash that is stored elsewhere.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, or_, select
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.identity.actor import Actor
from svc.identity.key_secret import hide_secrets
from svc.store.database import exclusive
from svc.store.tables import AuditRow, storable_text

FIRST_HASH = "0" * 64
"""Value used in the first row in place of a previous row's hash."""
_READ_TOGETHER = 1_000


class Action(StrEnum):
    """Kind of change that an audit event records."""

    SERVE = "serve"
    """A server was started with a version other than the last one served, or a model was added."""
    PROMOTE = "promote"
    ROLLOUT = "rollout"
    """A promotion through shadow and canary steps was requested; its success is recorded as `promote`."""
    ROLLBACK = "rollback"
    CREATE_KEY = "key.create"
    ROTATE_KEY = "key.rotate"
    REVOKE_KEY = "key.revoke"
    CREATE_JOB = "job.create"
    CANCEL_JOB = "job.cancel"
    CREATE_BATCH = "batch.create"
    CANCEL_BATCH = "batch.cancel"
    DELETE_MODEL = "model.delete"
    """The owner of a fine-tuned model deleted it. Its version stays in the registry."""
    REMOVE_VERSION = "version.remove"
    PUSH = "version.push"
    """Recorded before an upload to the Hugging Face Hub begins, because some files may have been uploaded even if the
    upload fails."""
    COLLECT = "gc"
    FORGET = "forget"
    BACKUP = "backup"
    """Recorded before the backup begins, because anyone who has the copy can read the contents of the home folder."""
    RESTORE = "restore"
    ACCEPT_DRIFT = "drift.accept"


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """An audit event to record.

    Attributes:
        subject: the version, key or path that was changed.
        details: further details of the change, as JSON values.
    """

    action: Action
    subject: str
    actor: Actor
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """A recorded audit event.

    Attributes:
        id: sequence number, starting at 1.
        at: time in ISO 8601, UTC.
        action: a value of `Action`, or one written by another release.
        actor: user or key, see `Actor.name`.
    """

    id: int
    at: str
    action: str
    subject: str
    actor: str
    origin: str
    reason: str | None
    details: Mapping[str, Any]
    hash: str


@dataclass(frozen=True, slots=True)
class ChainFault:
    """The first altered row of the audit log, and what is wrong with it."""

    id: int
    wrong: str


@dataclass(frozen=True, slots=True)
class ChainReport:
    """Result of verifying the audit log.

    Attributes:
        events: number of consecutive unaltered events, counted from the first.
        head: hash of the last unaltered event.
    """

    events: int
    head: str
    fault: ChainFault | None = None


def record_event(store: Store, entry: AuditEntry) -> int:
    """Record an audit event in its own transaction and return its id."""
    with exclusive(store) as session:
        return append_event(session, entry)


def append_event(session: Session, entry: AuditEntry) -> int:
    """Record an audit event within the `exclusive` transaction of the change it describes, and return its id."""
    last = session.scalar(select(AuditRow).order_by(AuditRow.id.desc()).limit(1))
    row = AuditRow(
        id=last.id + 1 if last else 1,
        at=datetime.now(UTC).isoformat(timespec="microseconds"),
        action=entry.action.value,
        subject=_storable(entry.subject),
        actor=_storable(entry.actor.name),
        origin=_storable(entry.actor.origin),
        reason=_storable(entry.reason) if entry.reason else None,
        details=json.dumps(entry.details, sort_keys=True),
        previous_hash=last.hash if last else FIRST_HASH,
    )
    row.hash = _hash(row)
    session.add(row)
    session.flush()
    return row.id


def read_events(
    store: Store, *, newest: int, action: str | None = None, subject: str | None = None, since: datetime | None = None
) -> list[AuditEvent]:
    """Return the most recent audit events, in chronological order.

    Args:
        newest: maximum number of events.
        subject: exact subject, or a model's name to match all of its versions.
    """
    query = select(AuditRow).order_by(AuditRow.id.desc()).limit(newest)
    if action is not None:
        query = query.where(AuditRow.action == action)
    if subject is not None:
        query = query.where(
            or_(AuditRow.subject == subject, AuditRow.subject.startswith(f"{subject}@", autoescape=True))
        )
    if since is not None:
        query = query.where(AuditRow.at >= since.astimezone(UTC).isoformat(timespec="microseconds"))
    with Session(store) as session:
        rows = session.scalars(query).all()
        return [_event(row) for row in reversed(rows)]


def _event(row: AuditRow) -> AuditEvent:
    """Convert a row to an event without validating its values, so that an altered row can still be shown."""
    values = {one.name: getattr(row, one.name) for one in fields(AuditEvent)}
    return AuditEvent(**values | {"details": _details(row.details)})


def verify_chain(store: Store | Connection, *, expected: str | None = None) -> ChainReport:
    """Recompute every hash in the audit log and report the first altered row.

    Args:
        store: the store, or a connection whose uncommitted rows are verified too.
        expected: an earlier hash, stored elsewhere, that must occur in some row.
    """
    head, count, seen = FIRST_HASH, 0, expected is None
    query = select(AuditRow).order_by(AuditRow.id).execution_options(yield_per=_READ_TOGETHER)
    with Session(store) as session, session.scalars(query) as rows:
        for row in rows:
            if wrong := _wrong(row, count + 1, head):
                return ChainReport(count, head, wrong)
            head, count, seen = row.hash, row.id, seen or row.hash == expected
    if not seen:
        return ChainReport(
            count, head, ChainFault(count + 1, f"no row has hash {expected}: rows were deleted or rewritten")
        )
    return ChainReport(count, head)


def _wrong(row: AuditRow, id: int, previous_hash: str) -> ChainFault | None:
    if row.id != id:
        return ChainFault(id, f"the row is missing; the next row is {row.id}")
    if row.previous_hash != previous_hash:
        return ChainFault(id, "the stored hash of the previous row does not match the previous row's hash")
    if row.hash != _hash(row):
        return ChainFault(id, "the row's hash does not match its content")
    return None


def _hash(row: AuditRow) -> str:
    content = [row.id, row.at, row.action, row.subject, row.actor, row.origin, row.reason, row.details]
    return hashlib.sha256(json.dumps([*content, row.previous_hash]).encode("ascii")).hexdigest()


def _details(text: str) -> dict[str, Any]:
    """Parse a row's details. Details that are not valid, as in an altered row, are returned in a displayable
    form.
    """
    try:
        details = json.loads(text)
    except ValueError:
        details = None
    return details if isinstance(details, dict) else {"unreadable": text}


def _storable(text: str) -> str:
    """Redact secrets from a text, and replace characters that a database or a terminal cannot handle, such as
    undecodable bytes of a command line. A secret could not be removed later, because the audit log is append-only.
    """
    return storable_text(hide_secrets(text))
