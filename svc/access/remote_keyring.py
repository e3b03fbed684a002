"""The keys of a server on another machine."""

from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from svc.access.key_row import key_of
from svc.access.keyring import IssuedKey
from svc.principal import Limits, Scope
from svc.remote_server import RemoteServer
from svc.store.keys import Key, no_such_key


class RemoteKeyring:
    """As `Keyring`, through the server's API; keys come without hashes."""

    def __init__(self, server: RemoteServer) -> None:
        self._server = server

    def all(self) -> list[Key]:
        """All keys, revoked ones too."""
        return [key_of(row) for row in self._rows()]

    def last_used(self) -> dict[str, datetime]:
        """The hour in which each key was used last."""
        return {row["key_id"]: datetime.fromisoformat(row["last_used"]) for row in self._rows() if row["last_used"]}

    def find(self, text: str) -> Key:
        """A key by its id, or its name; see `Keyring.find`."""
        keys = sorted(self.all(), key=lambda key: key.id != text)  # an id goes before a name
        for key in keys:
            if text == key.id or (text == key.principal.name and key.revoked_at is None):
                return key
        raise no_such_key(text)

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
        """Makes a key; see `Keyring.create`."""
        asked = {
            "scopes": sorted(scopes),
            "name": name,
            "models": None if models is None else sorted(models),
            "limits": asdict(limits or Limits()),
            "weight": weight,
            "expires_at": expires_at and expires_at.isoformat(),
            "reason": reason,
        }
        return _issued(self._server.post("/svc/keys", asked))

    def rotate(self, text: str, *, grace: timedelta = timedelta(), reason: str | None = None) -> IssuedKey:
        """Gives a key another secret; see `Keyring.rotate`."""
        asked = {"key": text, "grace_s": grace.total_seconds(), "reason": reason}
        return _issued(self._server.post("/svc/keys/rotate", asked))

    def revoke(self, text: str, *, reason: str | None = None) -> Key:
        """Ends a key for ever; see `Keyring.revoke`."""
        return key_of(self._server.post("/svc/keys/revoke", {"key": text, "reason": reason}))

    def _rows(self) -> list[dict[str, Any]]:
        return list(self._server.get("/svc/keys")["keys"])


def _issued(row: dict[str, Any]) -> IssuedKey:
    return IssuedKey(key_of(row), row["secret"])
