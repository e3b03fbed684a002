"""Creates a home folder from a snapshot. Databases are restored last, so there is nothing to serve until then.

The store is first copied to a separate folder. In this copy, all keys that are revoked in a newer snapshot (or, on
request, all keys) are revoked, so that the restored home never accepts them. The home's lock keeps servers out during
the restore.
"""

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from serving.backup.archive import OTHER_FILES, STORE_FILE, TRACKING_FILE, Archive, Snapshot
from serving.backup.copying import (
    Progress,
    copy_all,
    copy_content,
    copy_file,
    copy_version,
    has_content,
    is_copied,
    no_progress,
)
from serving.backup.restored_keys import RestoredKeys, settle_keys
from serving.files.client_files import FILES_FOLDER
from svc.errors import IntegrityError, RefusedError, SettingsError
from svc.files.disk import sync_folder, write_whole
from svc.files.lock import hold_lock
from svc.registry.files import verify_files
from svc.registry.manifest import read_manifest
from svc.remote.server_url import LOCK_FILE
from svc.store.database import closing_store, open_database
from svc.version import VersionId

log = logging.getLogger(__name__)

_MARK = ".restoring"
_ASIDE = ".restored-store"
_NO_CONTENT = {LOCK_FILE, _MARK, _ASIDE, "lost+found"}


def restore_home(
    archive: Archive,
    snapshot: Snapshot,
    home: Path,
    *,
    progress: Progress = no_progress,
    revoke_keys: bool = False,
    on_keys: Callable[[RestoredKeys], None] = lambda keys: None,
) -> None:
    """Restore a home folder from a snapshot in an archive, or resume an interrupted restore.

    A snapshot of a home whose store is in PostgreSQL has no keys to report or to revoke.

    Args:
        home: path of the home folder to create.
        revoke_keys: whether to revoke all API keys that the snapshot contains.
        on_keys: function called with the restored API keys before anything is copied into the home folder. An exception
            aborts the restore.

    Raises:
        BusyError: a server is using the home folder, or a backup is running.
        RefusedError: `revoke_keys` is set, but the snapshot contains no keys.
        SettingsError: the home folder is not empty.
        IntegrityError: the snapshot is damaged. None of its files are used.
    """
    if snapshot.store and revoke_keys:
        raise RefusedError(
            f"snapshot {snapshot.name} contains no API keys: they are stored in the database {snapshot.store}",
            todo="restore without --revoke-keys, restore the database, then revoke the keys: svc keys revoke",
        )
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    own, aside, mark = archive.folder(snapshot), home / _ASIDE, home / _MARK
    with (
        hold_lock(home / LOCK_FILE, f"the home folder {home}"),
        hold_lock(archive.lock, f"the backup in {archive}"),
    ):
        _require_empty(home, snapshot)
        try:
            verify_files(own, snapshot.files)  # versions are checked as they are copied
        except IntegrityError as error:
            raise IntegrityError(error.wrong, todo="restore an older snapshot: --snapshot NAME") from error
        try:
            if snapshot.store is None:
                shutil.rmtree(aside, ignore_errors=True)  # of a restore that was killed
                aside.mkdir(mode=0o700)
                copy_file(own / STORE_FILE, aside / STORE_FILE)
                with closing_store(open_database(aside)) as store:
                    keys = settle_keys(store, archive, snapshot, revoke_all=revoke_keys)
                on_keys(keys)
            write_whole(mark, snapshot.name.encode())
            _copy_versions(archive, snapshot, home, progress)
            _copy_contents(archive, snapshot, home, progress)
            for path in sorted((own / OTHER_FILES).iterdir()):
                copy_file(path, home / path.name)
            if (own / TRACKING_FILE).exists():
                copy_file(own / TRACKING_FILE, home / TRACKING_FILE)
            if snapshot.store is None:
                (aside / STORE_FILE).rename(home / STORE_FILE)
            sync_folder(home)
            mark.unlink()
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _require_empty(home: Path, snapshot: Snapshot) -> None:
    mark = home / _MARK
    begun = mark.read_text("utf-8") if mark.exists() else None
    if begun not in (None, snapshot.name):
        raise SettingsError(
            f"{home} contains an interrupted restore of snapshot {begun}",
            todo=f"resume it with --snapshot {begun}, or restore into another home folder",
        )
    if begun is None and (content := set(os.listdir(home)) - _NO_CONTENT):
        raise SettingsError(
            f"the home folder {home} is not empty: it contains {', '.join(sorted(content)[:3])}",
            expected="a new or empty folder",
            todo="restore into another home folder (svc --home NEW restore DIR), or move this one elsewhere",
        )


def _copy_versions(archive: Archive, snapshot: Snapshot, home: Path, progress: Progress) -> None:
    to_copy = []
    for version in map(VersionId.parse, snapshot.versions):
        source, target = archive.version(version), home / "models" / version.name / str(version.number)
        manifest = read_manifest(source)
        if not is_copied(manifest, target):
            to_copy.append((manifest, source, target))
    with progress(sum(file.bytes for manifest, _, _ in to_copy for file in manifest.files)) as on_bytes:
        for manifest, source, target in to_copy:
            copy_version(manifest, source, target, on_bytes)


def _copy_contents(archive: Archive, snapshot: Snapshot, home: Path, progress: Progress) -> None:
    """Copy the contents of clients' files.

    A damaged file must not prevent the restore of everything else. The file is omitted, and clients that request it
    get the error `file_content_missing`.
    """
    contents, folder = archive.contents_of(snapshot), home / FILES_FOLDER
    if not contents:
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    to_copy = {
        content.id: (
            content.bytes,
            partial(copy_content, content, archive.contents / content.sha256, folder / content.id),
        )
        for content in contents
        if not has_content(folder / content.id, content)
    }
    for id, error in copy_all(to_copy, progress).items():
        log.error("could not restore the content of %s: %s", id, error)
    sync_folder(folder)
