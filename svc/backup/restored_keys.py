"""Which keys a restored store would accept. What was revoked after its snapshot was taken stays revoked."""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Engine as Store

from svc.access.keyring import Keyring
from svc.actor import Actor
from svc.backup.archive import STORE_FILE, Archive, Snapshot
from svc.store.keys import Key


@dataclass(frozen=True, slots=True)
class RestoredKeys:
    """The keys of a store that is being restored.

    Attributes:
        valid: those that are accepted once it is restored.
        last_used: the hour in which each key was used last, by id; as of the snapshot.
        revoked: those that were revoked now, by the name of the newer snapshot that has them revoked, or "" where all
            were to be.
        rotated: ids of valid keys that have another secret in a newer snapshot: the old one is valid again.
        unread: newer snapshots whose store cannot be read.
    """

    valid: tuple[Key, ...]
    last_used: Mapping[str, datetime]
    revoked: tuple[tuple[Key, str], ...]
    rotated: frozenset[str]
    unread: tuple[str, ...]


def settle_keys(store: Store, archive: Archive, snapshot: Snapshot, *, revoke_all: bool) -> RestoredKeys:
    """Revoke the keys that newer snapshots of an archive have revoked, each with its event in the audit log.

    Args:
        store: the copy of the snapshot's, which is nobody's yet.
        revoke_all: revoke all others too.
    """
    keyring, now = Keyring(store, Actor.local()), datetime.now(UTC)
    later, unread = _later(archive, snapshot) if any(not key.revoked_at for key in keyring.all()) else ({}, ())
    revoked, rotated = list[tuple[Key, str]](), set[str]()
    for key in keyring.all():
        known = later.get(key.id)
        if key.revoked_at is None and (revoke_all or (known and known.revoked_in)):
            source = known.revoked_in if known else ""
            reason = f"the snapshot {source} has it revoked" if source else "svc restore --revoke-keys"
            revoked.append((keyring.revoke(key.id, reason=reason), source))
        elif key.revoked_at is None and known and known.hash != key.hash:
            rotated.add(key.id)
    valid = tuple(key for key in keyring.all() if key.usable(now))
    return RestoredKeys(valid, keyring.last_used(), tuple(revoked), frozenset(rotated), unread)


@dataclass(slots=True)
class _LaterKey:
    """A key in newer snapshots.

    Attributes:
        hash: of its secret, in the newest.
        revoked_in: the oldest that has it revoked; empty where none has.
    """

    hash: str
    revoked_in: str = ""


def _later(archive: Archive, snapshot: Snapshot) -> tuple[dict[str, _LaterKey], tuple[str, ...]]:
    found, unread = dict[str, _LaterKey](), list[str]()
    for newer in archive.snapshots():
        if newer.name <= snapshot.name:
            continue
        try:
            rows = _read_keys(archive.folder(newer) / STORE_FILE)
        except sqlite3.Error:  # damaged: perhaps the reason why an older one is restored
            unread.append(newer.name)
            continue
        for key_id, hash, revoked_at in rows:
            key = found.setdefault(key_id, _LaterKey(hash))
            key.hash = hash
            if revoked_at is not None and not key.revoked_in:
                key.revoked_in = newer.name
    return found, tuple(unread)


def _read_keys(path: Path) -> list[tuple[str, str, str | None]]:
    """Read the keys of a snapshot without changing it: no migration, and no new files in its folder."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
        return database.execute("SELECT id, hash, revoked_at FROM keys").fetchall()
