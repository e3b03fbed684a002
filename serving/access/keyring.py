"""Creates, rotates and revokes keys, and records each change in the audit log. Secrets are never stored."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine as Store

from serving.access.usage import last_used
from svc.errors import RefusedError, SettingsError
from svc.identity.actor import Actor
from svc.identity.key_secret import PREFIX, hash_secret, new_key_id, new_secret
from svc.identity.principal import Limits, Principal, Scope
from svc.store.audit import Action, AuditEntry
from svc.store.keys import Key, add_key, find_key, read_keys, replace_secret, revoke_key
from svc.version import NAME_PATTERN

_KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A new or rotated key together with its secret. The secret cannot be retrieved later."""

    key: Key
    secret: str = field(repr=False)

    def row(self) -> dict[str, Any]:
        """Return the key as JSON, including its secret."""
        return {**key_row(self.key), "secret": self.secret}


class Keyring:
    """Reads and changes the keys in a store.

    Args:
        actor: user or key that the audit log names as the author of the changes.
        now: function that returns the current time.
    """

    def __init__(self, store: Store, actor: Actor, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._actor = actor
        self._now = now

    def rows(self) -> list[dict[str, Any]]:
        """Return all keys as JSON, including the hour in which each was last used."""
        used = last_used(self._store)
        return [{**key_row(key), "last_used": iso_seconds(used.get(key.id))} for key in read_keys(self._store)]

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
        """Create a key.

        Args:
            name: name of the key, or None to use its id.
            models: names of the models that the key may use, or None for all models.
            expires_at: expiry time of the key, or None for a key that does not expire.

        Raises:
            SettingsError: a name is invalid, or the expiry time is in the past.
            RefusedError: another key with this name exists and is not revoked.
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
        """Replace a key's secret.

        Args:
            text: id or name of the key.
            grace: how long the old secret stays valid.

        Raises:
            NotFoundError: no key has this id or name.
            RefusedError: the key is revoked or has expired.
        """
        key, now = find_key(self._store, text), self._now()
        if key.expired(now):
            raise RefusedError(f"key {key.id} has expired", todo="create a new key: svc keys create")
        secret, until = new_secret(key.id), now + grace
        entry = self._entry(Action.ROTATE_KEY, key.id, reason, {"grace_s": grace.total_seconds()})
        replace_secret(self._store, key.id, hash_secret(secret), previous_until=until, entry=entry)
        return IssuedKey(find_key(self._store, key.id), secret)

    def revoke(self, text: str, *, reason: str | None = None) -> Key:
        """Revoke a key permanently.

        Args:
            text: id or name of the key.

        Raises:
            NotFoundError: no key has this id or name.
            RefusedError: the key is already revoked.
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
            "the key name is not valid",
            expected=f"at most 63 characters from A-Z a-z 0-9 . _ @ -, not starting with {PREFIX}",
        )
    for model in sorted(models or ()):
        if not re.fullmatch(NAME_PATTERN, model):
            wrong = f"{model!r} is not a valid model name"
            raise SettingsError(wrong, expected="a name without a version, for example tickets")
    if expires_at is not None and expires_at <= now:
        raise SettingsError(f"the expiry time {expires_at.isoformat()} is in the past", expected="a time in the future")


def key_row(key: Key) -> dict[str, Any]:
    """Return a key as JSON without any hashes, for `--json` and the administration API."""
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
    """Return a time in ISO 8601 format, to the second, or None if no time is given."""
    return moment.isoformat(timespec="seconds") if moment else None
