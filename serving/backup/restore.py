"""Creates a home folder from a snapshot. Databases are restored last, so there is nothing to serve until then.

The store is first copied to a separate folder. In this copy, all keys that are revoked in a newer snapshot (or, on
request, all keys) are revoked, so that the restored home never accepts them. The home's lock keeps servers out during
the restore.
"""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serving.backup.archive import OTHER_FILES, STORE_FILE, TRACKING_FILE, Archive, Snapshot
from serving.backup.contents import copy_content, has_content
from serving.backup.copying import Progress, copy_file, copy_version, is_copied, no_progress
from serving.backup.restored_keys import RestoredKeys, settle_keys
from serving.files.client_files import FILES_FOLDER
from svc.errors import IntegrityError, RefusedError, SettingsError
from svc.files.disk import sync_folder, write_whole
from svc.files.lock import hold_lock
from svc.registry.files import verify_files
from svc.registry.manifest import read_manifest
from svc.remote.server_url import LOCK_FILE
from svc.store.database import open_database
from svc.version import VersionId

log = logging.getLogger(__name__)

_MARK = ".restoring"
_ASIDE = ".restored-store"
_NO_CONTENT = {LOCK_FILE, _MARK, _ASIDE, "lost+found"}


@dataclass(frozen=True, slots=True)
class Restore:
    """Restores a home folder from a snapshot in an archive.

    Attributes:
        home: path of the home folder to create.
        revoke_keys: whether to revoke all API keys that the snapshot contains.
        on_keys: function called with the restored API keys before anything is copied into the home folder. An exception
            aborts the restore.
    """

    archive: Archive
    home: Path
    progress: Progress = no_progress
    revoke_keys: bool = False
    on_keys: Callable[[RestoredKeys], None] = lambda keys: None

    def run(self, snapshot: Snapshot) -> None:
        """Restore the snapshot, or resume an interrupted restore.

        A snapshot of a home whose store is in PostgreSQL has no keys to report or to revoke.

        Raises:
            BusyError: a server is using the home folder, or a backup is running.
            RefusedError: `revoke_keys` is set, but the snapshot contains no keys.
            SettingsError: the home folder is not empty.
            IntegrityError: the snapshot is damaged. None of its files are used.
        """
        if snapshot.store and self.revoke_keys:
            raise RefusedError(
                f"snapshot {snapshot.name} contains no API keys: they are stored in the database {snapshot.store}",
                todo="restore without --revoke-keys, restore the database, then revoke the keys: svc keys revoke",
            )
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (
            hold_lock(self.home / LOCK_FILE, f"the home folder {self.home}"),
            hold_lock(self.archive.lock, f"the backup in {self.archive}"),
        ):
            self._require_empty(snapshot)
            try:
                verify_files(self.archive.folder(snapshot), snapshot.files)  # versions are checked as they are copied
            except IntegrityError as error:
                raise IntegrityError(error.wrong, todo="restore an older snapshot: --snapshot NAME") from error
            aside = self.home / _ASIDE
            try:
                if snapshot.store is None:
                    self.on_keys(self._put_aside(snapshot, aside))
                self._fill(snapshot, aside)
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    def _put_aside(self, snapshot: Snapshot, aside: Path) -> RestoredKeys:
        """Copy the store to a separate folder, and revoke keys in that copy (see `settle_keys`)."""
        shutil.rmtree(aside, ignore_errors=True)  # of a restore that was killed
        aside.mkdir(mode=0o700)
        copy_file(self.archive.folder(snapshot) / STORE_FILE, aside / STORE_FILE)
        store = open_database(aside)
        try:
            return settle_keys(store, self.archive, snapshot, revoke_all=self.revoke_keys)
        finally:
            store.dispose()  # the last connection takes SQLite's other files with it

    def _fill(self, snapshot: Snapshot, aside: Path) -> None:
        write_whole(self.home / _MARK, snapshot.name.encode())
        self._copy_versions(snapshot)
        self._copy_contents(snapshot)
        own = self.archive.folder(snapshot)
        for path in sorted((own / OTHER_FILES).iterdir()):
            copy_file(path, self.home / path.name)
        if (own / TRACKING_FILE).exists():
            copy_file(own / TRACKING_FILE, self.home / TRACKING_FILE)
        if snapshot.store is None:
            (aside / STORE_FILE).rename(self.home / STORE_FILE)
        sync_folder(self.home)
        (self.home / _MARK).unlink()

    def _require_empty(self, snapshot: Snapshot) -> None:
        mark = self.home / _MARK
        begun = mark.read_text("utf-8") if mark.exists() else None
        if begun not in (None, snapshot.name):
            raise SettingsError(
                f"{self.home} contains an interrupted restore of snapshot {begun}",
                todo=f"resume it with --snapshot {begun}, or restore into another home folder",
            )
        if begun is None and (content := set(os.listdir(self.home)) - _NO_CONTENT):
            raise SettingsError(
                f"the home folder {self.home} is not empty: it contains {', '.join(sorted(content)[:3])}",
                expected="a new or empty folder",
                todo="restore into another home folder (svc --home NEW restore DIR), or move this one elsewhere",
            )

    def _copy_contents(self, snapshot: Snapshot) -> None:
        """Copy the contents of clients' files.

        A damaged file must not prevent the restore of everything else. The file is omitted, and clients that request it
        get the error `file_content_missing`.
        """
        contents, folder = self.archive.contents_of(snapshot), self.home / FILES_FOLDER
        if not contents:
            return
        folder.mkdir(mode=0o700, exist_ok=True)
        to_copy = [content for content in contents if not has_content(folder / content.id, content)]
        with self.progress(sum(content.bytes for content in to_copy)) as on_bytes:
            for content in to_copy:
                try:
                    copy_content(self.archive.contents / content.sha256, folder / content.id, content, on_bytes)
                except (FileNotFoundError, IntegrityError) as error:
                    log.error("could not restore the content of %s: %s", content.id, error)
        sync_folder(folder)

    def _copy_versions(self, snapshot: Snapshot) -> None:
        to_copy = []
        for version in map(VersionId.parse, snapshot.versions):
            source, target = self.archive.version(version), self.home / "models" / version.name / str(version.number)
            manifest = read_manifest(source)
            if not is_copied(manifest, target):
                to_copy.append((manifest, source, target))
        total = sum(file.bytes for manifest, _, _ in to_copy for file in manifest.files)
        with self.progress(total) as on_bytes:
            for manifest, source, target in to_copy:
                copy_version(manifest, source, target, on_bytes)
