"""Determines which keys are valid in a restored store. Keys that were revoked after the snapshot stay revoked."""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Engine as Store

from serving.access.keyring import Keyring
from serving.access.usage import last_used
from serving.backup.archive import STORE_FILE, Archive, Snapshot
from svc.identity.actor import Actor
from svc.store.keys import Key, read_keys


@dataclass(frozen=True, slots=True)
class RestoredKeys:
    """The keys in a store that is being restored.

    Attributes:
        valid: keys that will be accepted after the restore.
        last_used: hour of each key's last use before the snapshot, keyed by key id.
        revoked: keys revoked by this restore, each paired with the newer snapshot in which it is revoked, or with "" if
            all keys are revoked on request.
        rotated: ids of valid keys that have a different secret in a newer snapshot. Their old secret becomes
            valid again.
        unread: newer snapshots whose store cannot be read.
    """

    valid: tuple[Key, ...]
    last_used: Mapping[str, datetime]
    revoked: tuple[tuple[Key, str], ...]
    rotated: frozenset[str]
    unread: tuple[str, ...]


def settle_keys(store: Store, archive: Archive, snapshot: Snapshot, *, revoke_all: bool) -> RestoredKeys:
    """Revoke the keys that are revoked in newer snapshots of the archive, and record each revocation in the audit log.

    Args:
        store: copy of the snapshot's store, not yet in use.
        revoke_all: whether to revoke all other keys as well.
    """
    keyring, revoked, rotated = Keyring(store, Actor.local()), list[tuple[Key, str]](), set[str]()
    hashes, revoked_in, unread = _later(archive, snapshot)
    for key in read_keys(store):
        source = revoked_in.get(key.id, "")
        if key.revoked_at is not None:
            continue
        if source or revoke_all:
            reason = f"revoked in snapshot {source}" if source else "svc restore --revoke-keys"
            revoked.append((keyring.revoke(key.id, reason=reason), source))
        elif hashes.get(key.id, key.hash) != key.hash:
            rotated.add(key.id)
    valid = tuple(key for key in read_keys(store) if key.usable(datetime.now(UTC)))
    return RestoredKeys(valid, last_used(store), tuple(revoked), frozenset(rotated), unread)


def _later(archive: Archive, snapshot: Snapshot) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """Read the keys from all snapshots that are newer than the given one.

    Returns:
        Three values: the secret's hash in the newest of these snapshots, keyed by key id; the oldest of these
        snapshots in which a key is revoked, keyed by key id; and the names of the snapshots whose store cannot
        be read.
    """
    hashes, revoked_in, unread = dict[str, str](), dict[str, str](), list[str]()
    for newer in archive.snapshots():
        if newer.name <= snapshot.name:
            continue
        try:
            rows = _read_keys(archive.folder(newer) / STORE_FILE)
        except sqlite3.Error:  # damaged: perhaps the reason why an older one is restored
            unread.append(newer.name)
            continue
        for key_id, hash, revoked_at in rows:
            hashes[key_id] = hash
            if revoked_at is not None:
                revoked_in.setdefault(key_id, newer.name)
    return hashes, revoked_in, tuple(unread)


def _read_keys(path: Path) -> list[tuple[str, str, str | None]]:
    """Read the keys in a snapshot without changing it: no migration is run, and no files are created in its folder."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
        return database.execute("SELECT id, hash, revoked_at FROM keys").fetchall()
