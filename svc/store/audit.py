"""The audit log: who did what, when, from where and why. Rows are only added, and each row's hash covers the
previous hash, so that changed, removed and inserted rows are detected.

Triggers in the database reject changes. A user who can drop them can also rewrite all later hashes, or delete the
newest rows: an earlier hash that is stored elsewhere detects that.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from svc.identity.actor import Actor
from svc.identity.key_secret import hide_secrets
from svc.store.database import exclusive
from svc.store.tables import AuditRow

FIRST_HASH = "0" * 64
"""Value used as the previous hash in the first row."""
_READ_TOGETHER = 1_000


class Action(StrEnum):
    """Kind of change that an event records."""

    SERVE = "serve"
    """A server was started with a version other than the last one served, or a model was added."""
    PROMOTE = "promote"
    ROLLOUT = "rollout"
    """A promotion through shadow and canary steps was requested; its success is recorded as `promote`."""
    ROLLBACK = "rollback"
    CREATE_KEY = "key.create"
    ROTATE_KEY = "key.rotate"
    REVOKE_KEY = "key.revoke"
    REMOVE_VERSION = "version.remove"
    COLLECT = "gc"
    FORGET = "forget"
    BACKUP = "backup"
    """Recorded before the backup begins: anyone who has the copy can read the home's content."""
    RESTORE = "restore"
    ACCEPT_DRIFT = "drift.accept"


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """An event to record.

    Attributes:
        subject: changed thing: a version, a key or a path.
        details: further facts about the change, as JSON values.
    """

    action: Action
    subject: str
    actor: Actor
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """A recorded event.

    Attributes:
        id: consecutive number from 1.
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
    """The first altered row, and what is wrong with it."""

    id: int
    wrong: str


@dataclass(frozen=True, slots=True)
class ChainReport:
    """Result of verifying the log.

    Attributes:
        events: number of events, from the first one, that are unaltered.
        head: hash of the last unaltered event.
    """

    events: int
    head: str
    fault: ChainFault | None = None


def record_event(store: Store, entry: AuditEntry) -> int:
    """Record an event in its own transaction; return its id."""
    with exclusive(store) as session:
        return append_event(session, entry)


def append_event(session: Session, entry: AuditEntry) -> int:
    """Record an event in the `exclusive` transaction of the change it describes; return its id."""
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
    """Return the newest events, in order.

    Args:
        newest: maximum number.
        subject: exact subject, or a model's name for all its versions.
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
    """Return a row as an event. Its values are not checked, so that an altered row can be shown."""
    values = {one.name: getattr(row, one.name) for one in fields(AuditEvent)}
    return AuditEvent(**values | {"details": _details(row.details)})


def verify_chain(store: Store, *, expected: str | None = None) -> ChainReport:
    """Read all rows, compute every hash again, and report the first altered row.

    Args:
        expected: an earlier hash, stored elsewhere, that some row must have.
    """
    head, count, seen = FIRST_HASH, 0, expected is None
    query = select(AuditRow).order_by(AuditRow.id).execution_options(yield_per=_READ_TOGETHER)
    with Session(store) as session:
        for row in session.scalars(query):
            if wrong := _wrong(row, count + 1, head):
                return ChainReport(count, head, wrong)
            head, count, seen = row.hash, row.id, seen or row.hash == expected
    if not seen:
        return ChainReport(
            count, head, ChainFault(count + 1, f"no row has the hash {expected}: rows were deleted or rewritten")
        )
    return ChainReport(count, head)


def _wrong(row: AuditRow, id: int, previous_hash: str) -> ChainFault | None:
    if row.id != id:
        return ChainFault(id, f"row missing; the next row is {row.id}")
    if row.previous_hash != previous_hash:
        return ChainFault(id, "its previous hash is not that of the row before")
    if row.hash != _hash(row):
        return ChainFault(id, "its hash does not match its content")
    return None


def _hash(row: AuditRow) -> str:
    content = [row.id, row.at, row.action, row.subject, row.actor, row.origin, row.reason, row.details]
    return hashlib.sha256(json.dumps([*content, row.previous_hash]).encode("ascii")).hexdigest()


def _details(text: str) -> dict[str, Any]:
    """Return the details in a row; those of an altered row are returned in a form that can be shown."""
    try:
        details = json.loads(text)
    except ValueError:
        details = None
    return details if isinstance(details, dict) else {"unreadable": text}


def _storable(text: str) -> str:
    """Return a text without secrets, which could not be removed again, and without characters that UTF-8 or a terminal
    cannot handle, such as bytes of a command line that are not text."""
    return hide_secrets(text).encode("utf-8", "replace").decode("utf-8").replace("\0", "?")
