"""Makes, rotates and revokes keys, each with its event in the audit log. A secret is given out once, and never kept."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine as Store

from svc.errors import RefusedError, SettingsError
from svc.identity.actor import Actor
from svc.identity.key_secret import PREFIX, hash_secret, new_key_id, new_secret
from svc.identity.principal import Limits, Principal, Scope
from svc.store.audit import Action, AuditEntry
from svc.store.keys import Key, add_key, find_key, read_keys, replace_secret, revoke_key
from svc.store.usage import last_used
from svc.version import NAME_PATTERN

_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key with its secret, which nobody can read again."""

    key: Key
    secret: str = field(repr=False)

    def row(self) -> dict[str, Any]:
        """Return the key as JSON, with its secret."""
        return {**key_row(self.key), "secret": self.secret}


class Keyring:
    """The keys of one store.

    Args:
        actor: whoever changes them.
        now: the time.
    """

    def __init__(self, store: Store, actor: Actor, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._actor = actor
        self._now = now

    def all(self) -> list[Key]:
        """All keys, revoked ones too."""
        return read_keys(self._store)

    def last_used(self) -> dict[str, datetime]:
        """The hour in which each key was used last."""
        return last_used(self._store)

    def rows(self) -> list[dict[str, Any]]:
        """Return all keys as JSON, each with the hour in which it was used last."""
        used = self.last_used()
        return [{**key_row(key), "last_used": iso_seconds(used.get(key.id))} for key in self.all()]

    def create(
        self,
        scopes: frozenset[Scope],
        *,
        name: str | None = None,
        models: frozenset[str] | None = None,
        limits: Limits | None = None,
        weight: int = 1,
        expires_at: datetime | None = None,
        reason: str | None = None,
    ) -> IssuedKey:
        """Makes a key.

        Args:
            name: default: its id.
            models: names; None: all.
            expires_at: None: never.

        Raises:
            SettingsError: a name that is none, or an end that has passed.
            RefusedError: a key that is not revoked has the name.
        """
        key_id, now = new_key_id(), self._now()
        _check(name, models, expires_at, now)
        secret = new_secret(key_id)
        principal = Principal(key_id, name or key_id, scopes, models, limits or Limits(), weight)
        key = Key(principal, hash_secret(secret), created_at=now, expires_at=expires_at)
        details = {
            "name": principal.name,
            "scopes": sorted(scopes),
            "models": None if models is None else sorted(models),
            "limits": {name: limit for name, limit in asdict(principal.limits).items() if limit is not None},
            "weight": weight,
            "expires_at": expires_at and expires_at.isoformat(),
        }
        add_key(self._store, key, self._entry(Action.CREATE_KEY, key_id, reason, details))
        return IssuedKey(key, secret)

    def rotate(self, text: str, *, grace: timedelta = timedelta(), reason: str | None = None) -> IssuedKey:
        """Gives a key another secret.

        Args:
            text: its id or name.
            grace: so long the secret of before is right too.

        Raises:
            NotFoundError: there is no such key.
            RefusedError: it is revoked, or has expired.
        """
        key, now = find_key(self._store, text), self._now()
        if key.expired(now):
            raise RefusedError(f"the key {key.id} has expired", todo="make another: svc keys create")
        secret, until = new_secret(key.id), now + grace
        entry = self._entry(Action.ROTATE_KEY, key.id, reason, {"grace_s": grace.total_seconds()})
        replace_secret(self._store, key.id, hash_secret(secret), previous_until=until, entry=entry)
        return IssuedKey(find_key(self._store, key.id), secret)

    def revoke(self, text: str, *, reason: str | None = None) -> Key:
        """Ends a key for ever.

        Args:
            text: its id or name.

        Raises:
            NotFoundError: there is no such key.
            RefusedError: it is revoked already.
        """
        key = find_key(self._store, text)
        entry = self._entry(Action.REVOKE_KEY, key.id, reason, {"name": key.principal.name})
        revoke_key(self._store, key.id, at=self._now(), entry=entry)
        return find_key(self._store, key.id)

    def _entry(self, action: Action, key_id: str, reason: str | None, details: Mapping[str, Any]) -> AuditEntry:
        return AuditEntry(action, f"key:{key_id}", self._actor, reason, details)


def _check(name: str | None, models: frozenset[str] | None, expires_at: datetime | None, now: datetime) -> None:
    if name is not None and (not _KEY_NAME.fullmatch(name) or name.startswith(PREFIX)):
        raise SettingsError(
            "a key cannot have this name",
            expected="at most 63 of A-Z a-z 0-9 . _ @ -, and not the beginning of a secret",
        )
    for model in sorted(models or ()):
        if not re.fullmatch(NAME_PATTERN, model):
            raise SettingsError(f"{model!r} is no name of a model", expected="a name without a version, as tickets")
    if expires_at is not None and expires_at <= now:
        raise SettingsError(f"{expires_at.isoformat()} has passed", expected="a time to come, as 90d or a date")


def key_row(key: Key) -> dict[str, Any]:
    """Return a key as JSON without any hash: for machines, and for the administration API."""
    principal, now = key.principal, datetime.now(UTC)
    rotating = key.previous_until is not None and key.previous_until > now
    return {
        "key_id": key.id,
        "name": principal.name,
        "state": "revoked" if key.revoked_at else "expired" if key.expired(now) else "active",
        "scopes": sorted(principal.scopes),
        "models": None if principal.models is None else sorted(principal.models),
        "limits": asdict(principal.limits),
        "weight": principal.weight,
        "created_at": iso_seconds(key.created_at),
        "expires_at": iso_seconds(key.expires_at),
        "revoked_at": iso_seconds(key.revoked_at),
        "old_secret_until": iso_seconds(key.previous_until) if rotating else None,
    }


def iso_seconds(moment: datetime | None) -> str | None:
    """Return a time to the second, as ISO 8601."""
    return moment.isoformat(timespec="seconds") if moment else None
