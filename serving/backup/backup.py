"""Creates a snapshot of a home folder that may be in use by servers, training runs and commands.

A snapshot must contain every version that its databases refer to. The databases are therefore copied before the
weights, and the store before MLflow, because a version is in MLflow before the store can refer to it. A version is not
removed from the home folder while it is required, for example by an alias. If a version is no longer required and is
removed before it has been copied, the databases are copied again. Versions registered during a backup are included in
the next backup.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version as release_of
from pathlib import Path

from sqlalchemy import Engine as Store

from serving.backup.archive import CONTENTS, CONTENTS_FILE, OTHER_FILES, STORE_FILE, TRACKING_FILE, Archive, Snapshot
from serving.backup.copying import (
    Copy,
    Key,
    Progress,
    copy_all,
    copy_content,
    copy_database,
    copy_file,
    copy_version,
    has_content,
    is_copied,
    no_progress,
)
from serving.files.client_files import FILES_FOLDER
from serving.files.rows import FileContent, known_files, read_contents
from svc.errors import DiskSpaceError, IntegrityError, NotFoundError
from svc.files.disk import is_full, sync_folder, write_whole
from svc.files.lock import hold_lock
from svc.registry.files import record_files
from svc.registry.housekeeping import protected
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.registry.tracking import Tracking
from svc.settings.settings import Settings
from svc.store.database import closing_store, open_database, open_store
from svc.store.desired import desired_names
from svc.store.postgresql import location
from svc.store.swaps import unfinished_swaps
from svc.version import VersionId

_TRIES = 5
_NOT_COPIED = (".db", ".db-wal", ".db-shm", ".db-journal", ".lock")


@dataclass(frozen=True, slots=True)
class BackupReport:
    """Result of a backup.

    Attributes:
        snapshot: the new snapshot.
        copied: versions whose weights were copied. All other versions were already in the archive.
        pruned: older snapshots that were removed.
    """

    snapshot: Snapshot
    copied: tuple[str, ...]
    pruned: tuple[str, ...]


@dataclass
class Backup:
    """A backup of one home folder into an archive.

    Attributes:
        verify: whether to also check existing copies against their hashes, and replace those that are damaged.
    """

    settings: Settings
    archive: Archive
    verify: bool = False
    progress: Progress = no_progress
    _copied: list[str] = field(default_factory=list, init=False)

    def run(self, keep: int) -> BackupReport:
        """Create a snapshot.

        Args:
            keep: number of snapshots to keep, including the new one.

        Raises:
            BusyError: another backup is running.
            DiskSpaceError: there is not enough disk space.
            IntegrityError: a database is damaged, or the archive belongs to another home folder.
        """
        self.archive.prepare()
        with hold_lock(self.archive.lock, f"the backup in {self.archive}"):
            try:
                snapshot = self._snapshot()
            except OSError as error:
                if not is_full(error, self.archive.models):
                    raise
                raise self._no_room(f"the disk that holds {self.archive} is full") from error
            return BackupReport(snapshot, tuple(self._copied), self.archive.prune(keep))

    def _snapshot(self) -> Snapshot:
        for left in reversed(range(_TRIES)):
            folder = self.archive.begin()
            try:
                snapshot = self._take(folder, is_last=not left)
                if snapshot:
                    self.archive.finish(snapshot)
                    return snapshot
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        raise AssertionError("unreachable: the last attempt returns a snapshot")

    def _take(self, folder: Path, *, is_last: bool) -> Snapshot | None:
        """Copy the home folder's state into a snapshot's folder, and return the snapshot.

        If a required version was removed before it could be copied, return None, or, if `is_last` is set, a snapshot
        without this version.
        """
        home, tracking_uri, registry = self.settings.home, self.settings.tracking_uri, Registry.of(self.settings)
        there = set(registry.versions())  # first, so that MLflow's copy knows all of them
        if self.settings.store.url is None:
            copy_database(home / STORE_FILE, folder / STORE_FILE)
        if not tracking_uri and (home / TRACKING_FILE).exists():
            copy_database(home / TRACKING_FILE, folder / TRACKING_FILE)
        (folder / OTHER_FILES).mkdir(mode=0o700)
        for path in _other_files(home):
            copy_file(path, folder / OTHER_FILES / path.name)
        copied = Registry(registry.models, Tracking(tracking_uri or f"sqlite:///{folder / TRACKING_FILE}"))
        opened = open_database(folder) if self.settings.store.url is None else open_store(self.settings)
        with closing_store(opened) as store:
            needed, contents = _needed_versions(copied, store), read_contents(store)
        kept, left_out = self._copy(registry, sorted(there | needed))
        missing = needed - kept - left_out.keys()
        if missing and not is_last:
            return None
        left_out |= dict.fromkeys(missing, "needed but missing from the home")
        lost = self._copy_contents(folder, contents)
        return Snapshot(
            name=folder.name,
            release=release_of("tuneserve"),
            versions=tuple(map(str, sorted(kept))),
            files=record_files(folder, folder),
            tracking=Tracking(tracking_uri).where if tracking_uri else None,
            store=None if self.settings.store.url is None else location(store.url),
            left_out={str(version): why for version, why in sorted(left_out.items())} | lost,
        )

    def _copy(self, registry: Registry, wanted: Iterable[VersionId]) -> tuple[set[VersionId], dict[VersionId, str]]:
        """Copy the versions that are not in the archive yet.

        Returns:
            The versions that are now in the archive and, keyed by version, the reason why a damaged version could not
            be copied. A version that is no longer in the home folder appears in neither.
        """
        kept, left_out, to_copy = set[VersionId](), dict[VersionId, str](), dict[VersionId, Copy]()
        for version in wanted:
            try:
                manifest = registry.manifest(version)
            except NotFoundError:  # it was removed just now
                continue
            except IntegrityError as error:
                left_out[version] = error.wrong
                continue
            target = self.archive.version(version)
            if registry.objects is not None and not _is_complete(registry, manifest):
                left_out[version] = "its weights are only in the object store"
            elif is_copied(manifest, target, verify=self.verify):
                kept.add(version)
            else:
                copy = partial(copy_version, manifest, registry.folder(version), target)
                to_copy[version] = sum(file.bytes for file in manifest.files), copy
        errors = self._copy_all("weights", to_copy)
        copied = [version for version in to_copy if version not in errors]
        self._copied += map(str, copied)
        return kept | set(copied), left_out | _wrongs(errors)

    def _copy_contents(self, folder: Path, contents: Iterable[FileContent]) -> dict[str, str]:
        """Copy the contents of clients' files to the archive, unless they are already there, and write a list of the
        archived files to the snapshot's folder.

        Returns:
            The reasons why the contents of damaged or missing files are not in the archive, keyed by file id. Files
            that clients have deleted during the backup are omitted. Missing files are omitted too if the store is in
            PostgreSQL or there is an object store, because another server or the object store may have them.
        """
        to_copy = dict[str, Copy]()
        for content in contents:
            source, target = self.settings.home / FILES_FOLDER / content.id, self.archive.contents / content.sha256
            if not has_content(target, content, verify=self.verify):
                to_copy[content.id] = content.bytes, partial(copy_content, content, source, target)
        errors = self._copy_all("clients' files", to_copy) if to_copy else {}
        if to_copy:
            sync_folder(self.archive.contents)
        lost = _wrongs(errors)
        absent = [id for id in errors if id not in lost]
        if absent and self.settings.store.url is None and self.settings.artifacts.url is None:
            with closing_store(open_store(self.settings)) as store:
                lost |= dict.fromkeys(sorted(known_files(store, absent)), "missing from the home")
        if kept := tuple(content for content in contents if content.id not in errors):
            write_whole(folder / CONTENTS_FILE, CONTENTS.dump_json(kept))
        return lost

    def _copy_all(self, noun: str, copies: Mapping[Key, Copy]) -> dict[Key, FileNotFoundError | IntegrityError]:
        total = sum(size for size, _ in copies.values())
        if total > shutil.disk_usage(self.archive.models).free:
            raise self._no_room(f"not enough disk space for {total / 1e6:.0f} MB of {noun} in {self.archive}")
        return copy_all(copies, self.progress)

    def _no_room(self, wrong: str) -> DiskSpaceError:
        return DiskSpaceError(
            wrong, todo="free disk space, or keep fewer snapshots: --keep N; existing snapshots can still be restored"
        )


def _wrongs(errors: Mapping[Key, FileNotFoundError | IntegrityError]) -> dict[Key, str]:
    """Return the messages of the errors, except those about files that do not exist."""
    return {key: error.wrong for key, error in errors.items() if isinstance(error, IntegrityError)}


def _is_complete(registry: Registry, manifest: Manifest) -> bool:
    return all((registry.folder(manifest.id) / file.path).is_file() for file in manifest.files)


def _other_files(home: Path) -> list[Path]:
    """Return the files that a user has added to the home folder, such as settings and key files."""
    files = [path for path in home.iterdir() if path.is_file() and not path.is_symlink()]
    return sorted(path for path in files if not path.name.endswith(_NOT_COPIED) and not path.name.startswith("."))


def _needed_versions(registry: Registry, store: Store) -> set[VersionId]:
    """Return the versions required by an alias, a desired state, a rollback, an adapter or a running swap.

    Args:
        registry: registry of the home folder's versions that reads aliases from the snapshot's copy of MLflow's
            database, or from the tracking server.
        store: the snapshot's copy of the store, or the store itself if it is in PostgreSQL.
    """
    found = set[VersionId]()
    for name in {*registry.names(), *desired_names(store)}:
        found |= protected(registry, store, name).keys()
        found |= {swap.target.version for swap in unfinished_swaps(store, name)}
    return found
