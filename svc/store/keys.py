"""API keys, with one row per key. Each change also adds an audit log event. Secrets are stored only as hashes."""

from dataclasses import asdict, dataclass, field
from datetime import datetime

from sqlalchemy import Engine as Store
from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from svc.errors import NotFoundError, RefusedError
from svc.identity.principal import Limits, Principal
from svc.store.audit import AuditEntry, append_event
from svc.store.database import announce_change, exclusive
from svc.store.tables import KeyRow

_REVISION = select(func.max(KeyRow.revision))


@dataclass(frozen=True, slots=True)
class Key:
    """An API key.

    Attributes:
        hash: hash of the current secret.
        expires_at: expiry time, or None if the key never expires.
        previous_hash: hash of the secret before the last rotation, which stays valid until `previous_until`.
    """

    principal: Principal
    hash: str = field(repr=False)
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    previous_hash: str | None = field(default=None, repr=False)
    previous_until: datetime | None = None

    @property
    def id(self) -> str:
        return self.principal.key_id

    def usable(self, now: datetime) -> bool:
        """Return whether the key is neither revoked nor expired."""
        return self.revoked_at is None and not self.expired(now)

    def expired(self, now: datetime) -> bool:
        """Return whether the key has expired."""
        return self.expires_at is not None and self.expires_at <= now


def add_key(store: Store, key: Key, entry: AuditEntry) -> None:
    """Add an API key.

    Raises:
        RefusedError: the id already exists, or the name belongs to another key that is not revoked.
    """
    principal = key.principal
    with exclusive(store) as session:
        same = or_(KeyRow.id == key.id, (KeyRow.name == principal.name) & KeyRow.revoked_at.is_(None))
        if session.scalar(select(KeyRow.id).where(same).limit(1)):
            raise RefusedError(
                f"a key named {principal.name!r} already exists",
                todo="choose another name, or replace that key's secret: svc keys rotate",
            )
        session.add(
            KeyRow.of(
                key,
                revision=_next_revision(session),
                name=principal.name,
                scopes=" ".join(sorted(principal.scopes)),
                models=None if principal.models is None else " ".join(sorted(principal.models)),
                weight=principal.weight,
                **asdict(principal.limits),
            )
        )
        append_event(session, entry)


def replace_secret(store: Store, key_id: str, hash: str, *, previous_until: datetime, entry: AuditEntry) -> None:
    """Replace the secret of an API key.

    Args:
        previous_until: time until which the previous secret stays valid. Older secrets are invalid.

    Raises:
        RefusedError: the key is revoked.
    """
    with exclusive(store) as session:
        row = _unrevoked(session, key_id)
        row.previous_hash, row.previous_until = row.hash, previous_until
        row.hash, row.revision = hash, _next_revision(session)
        append_event(session, entry)


def revoke_key(store: Store, key_id: str, *, at: datetime, entry: AuditEntry) -> None:
    """Revoke an API key permanently.

    Raises:
        RefusedError: the key is already revoked.
    """
    with exclusive(store) as session:
        row = _unrevoked(session, key_id)
        row.revoked_at, row.revision = at, _next_revision(session)
        append_event(session, entry)


def keys_revision(store: Store) -> int:
    """Return a number that increases with every change to any API key, or 0 if there are none. Reads only one
    index entry.
    """
    with store.connect() as connection:  # read twice per second: without the ORM, a third of the time
        return connection.scalar(_REVISION) or 0


def read_keys(store: Store) -> list[Key]:
    """Return all API keys, oldest first."""
    with Session(store) as session:
        return [_key(row) for row in session.scalars(select(KeyRow).order_by(KeyRow.created_at, KeyRow.id))]


def find_key(store: Store, text: str) -> Key:
    """Return the API key with the given id, or the unrevoked key with the given name.

    Raises:
        NotFoundError: there is no such key.
    """
    named = (KeyRow.name == text) & KeyRow.revoked_at.is_(None)
    with Session(store) as session:
        query = select(KeyRow).where(or_(KeyRow.id == text, named))
        row = session.scalar(query.order_by(KeyRow.id != text).limit(1))  # an id takes precedence over a name
        if row is None:
            raise no_such_key(text)
        return _key(row)


def no_such_key(text: str) -> NotFoundError:
    """Return the error for an unknown API key. If a secret was given instead of an id, the error message contains
    only the beginning of the secret.
    """
    shown = f"{text[:11]}..." if len(text) > 63 or text.startswith("ts_") else text
    return NotFoundError(
        f"there is no key {shown!r}", expected="the id or name of a key", todo="list the keys: svc keys list"
    )


def _next_revision(session: Session) -> int:
    """Return the revision number to store with a changed API key, and announce the change to servers."""
    announce_change(session.connection())
    return (session.scalar(_REVISION) or 0) + 1


def _unrevoked(session: Session, key_id: str) -> KeyRow:
    row = session.get_one(KeyRow, key_id)
    if row.revoked_at is not None:
        raise RefusedError(f"key {key_id} has been revoked", todo="create a new key: svc keys create")
    return row


def _key(row: KeyRow) -> Key:
    models = None if row.models is None else row.models.split()
    limits = row.read(Limits)
    principal = row.read(Principal, key_id=row.id, scopes=row.scopes.split(), models=models, limits=limits)
    return row.read(Key, principal=principal)
