"""A key as JSON, without any hash: for machines, and between a server and whoever administers it from elsewhere."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from svc.principal import Limits, Principal, Scope
from svc.store.keys import Key


def key_row(key: Key) -> dict[str, Any]:
    """Writes one."""
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


def key_of(row: Mapping[str, Any]) -> Key:
    """Reads one; its hash is empty."""
    models = row["models"]
    return Key(
        Principal(
            key_id=row["key_id"],
            name=row["name"],
            scopes=frozenset(Scope(scope) for scope in row["scopes"]),
            models=None if models is None else frozenset(models),
            limits=Limits(**row["limits"]),
            weight=row["weight"],
        ),
        hash="",
        created_at=datetime.fromisoformat(row["created_at"]),
        expires_at=_moment(row["expires_at"]),
        revoked_at=_moment(row["revoked_at"]),
        previous_until=_moment(row["old_secret_until"]),
    )


def iso_seconds(moment: datetime | None) -> str | None:
    """A time to the second, as ISO 8601."""
    return moment.isoformat(timespec="seconds") if moment else None


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
