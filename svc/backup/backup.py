"""Makes a snapshot of a home that is used: servers promote, trainings register, somebody removes versions.

What the databases of a snapshot name must be in it. So they are copied before the weights, and the store before MLflow:
a version is known to MLflow before the store can name it. A version that they need stays, unless it is needed no more
and is removed before it is copied: then the databases are copied again. Versions that are registered meanwhile come
with the next backup.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version as release_of
from pathlib import Path

from sqlalchemy import Engine as Store

from svc.backup.archive import OTHER_FILES, STORE_FILE, TRACKING_FILE, Archive, Snapshot
from svc.backup.copying import OnBytes, copy_database, copy_file, copy_version, files_of, is_copied
from svc.disk import is_full
from svc.errors import DiskSpaceError, IntegrityError, NotFoundError
from svc.lock import hold_lock
from svc.registry.files import record_files, verify_files
from svc.registry.housekeeping import protected
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.registry.tracking import Tracking
from svc.settings import Settings
from svc.store.database import open_database
from svc.store.desired import desired_names
from svc.store.swaps import find_swap
from svc.version import VersionId

_TRIES = 5
_NOT_COPIED = (".db", ".db-wal", ".db-shm", ".db-journal", ".lock")


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What a backup did.

    Attributes:
        snapshot: what can be restored now.
        copied: versions that were copied now.
        pruned: older snapshots that were removed.
    """

    snapshot: Snapshot
    copied: tuple[str, ...]
    pruned: tuple[str, ...]


@dataclass(slots=True)
class _Versions:
    """What came of the versions.

    Attributes:
        kept: that are in the archive.
        left_out: that are damaged, and why.
    """

    kept: list[VersionId] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


class Backup:
    """Backs up one home into one archive.

    Args:
        verify: compares what was copied before with its hashes too, and copies it again where it is damaged.
        on_start: hears how many bytes of weights will be copied.
        on_bytes: hears how many more were.
    """

    def __init__(
        self,
        settings: Settings,
        archive: Archive,
        *,
        verify: bool = False,
        on_start: Callable[[int], None] = lambda total: None,
        on_bytes: OnBytes = lambda count: None,
    ) -> None:
        self._home = settings.home
        self._tracking_uri = settings.tracking_uri
        self._archive = archive
        self._verify = verify
        self._on_start = on_start
        self._on_bytes = on_bytes
        self._registry = Registry.of(settings)
        self._copied: list[str] = []

    def run(self, keep: int) -> BackupReport:
        """Makes a snapshot.

        Args:
            keep: so many stay.

        Raises:
            BusyError: another backup runs.
            DiskSpaceError: there is not enough room.
            IntegrityError: a database is damaged, or the archive is another home's.
        """
        self._archive.prepare()
        with hold_lock(self._archive.lock, f"the backup in {self._archive}"):
            try:
                snapshot = self._snapshot()
            except OSError as error:
                if not is_full(error, self._archive.models):
                    raise
                raise self._no_room() from error
            return BackupReport(snapshot, tuple(self._copied), self._archive.prune(keep))

    def _snapshot(self) -> Snapshot:
        for left in reversed(range(_TRIES)):
            folder = self._archive.begin()
            try:
                snapshot = self._take(folder, is_last=not left)
                if snapshot:
                    self._archive.finish(snapshot)
                    return snapshot
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder)
        raise AssertionError("the last try makes one")

    def _take(self, folder: Path, *, is_last: bool) -> Snapshot | None:
        """What goes into the snapshot's folder; None where a version has gone that the databases need."""
        there = set(self._registry.versions())  # first: those that MLflow's copy will know
        copy_database(self._home / STORE_FILE, folder / STORE_FILE)
        if not self._tracking_uri and (self._home / TRACKING_FILE).exists():
            copy_database(self._home / TRACKING_FILE, folder / TRACKING_FILE)
        (folder / OTHER_FILES).mkdir(mode=0o700)
        for path in _other_files(self._home):
            copy_file(path, folder / OTHER_FILES / path.name)
        needed = self._needed(folder)
        versions = self._copy(sorted(there | needed))
        missing = needed - set(versions.kept) - {VersionId.parse(text) for text in versions.left_out}
        if missing and not is_last:
            return None
        gone = {str(version): "it is needed, and is not in the home" for version in sorted(missing)}
        return Snapshot(
            name=folder.name,
            release=release_of("tuneserve"),
            versions=tuple(map(str, versions.kept)),
            files=record_files(folder, folder),
            tracking=self._tracking_uri or None,
            left_out=versions.left_out | gone,
        )

    def _needed(self, folder: Path) -> set[VersionId]:
        uri = self._tracking_uri or f"sqlite:///{folder / TRACKING_FILE}"
        store = open_database(folder)
        try:
            return _needed_versions(Registry(self._registry.models, Tracking(uri)), store)
        finally:
            store.dispose()  # the last connection takes SQLite's other files with it

    def _copy(self, wanted: Iterable[VersionId]) -> _Versions:
        found, to_copy = _Versions(), list[Manifest]()
        for version in wanted:
            try:
                manifest = self._registry.manifest(version)
            except NotFoundError:  # it was removed just now
                continue
            except IntegrityError as error:
                found.left_out[str(version)] = error.wrong
                continue
            if self._is_copied(manifest):
                found.kept.append(version)
            else:
                to_copy.append(manifest)
        total = sum(file.bytes for manifest in to_copy for file in files_of(manifest))
        if total > shutil.disk_usage(self._archive.models).free:
            raise self._no_room(f"{total / 1e6:.0f} MB of weights do not fit on the disk of {self._archive}")
        self._on_start(total)
        for manifest in to_copy:
            try:
                copy_version(
                    manifest, self._registry.folder(manifest.id), self._archive.version(manifest.id), self._on_bytes
                )
            except FileNotFoundError:
                continue
            except IntegrityError as error:
                found.left_out[str(manifest.id)] = error.wrong
                continue
            found.kept.append(manifest.id)
            self._copied.append(str(manifest.id))
        found.kept.sort()
        return found

    def _is_copied(self, manifest: Manifest) -> bool:
        copy = self._archive.version(manifest.id)
        if not is_copied(manifest, copy):
            return False
        try:
            verify_files(copy, files_of(manifest) if self._verify else ())
        except IntegrityError:
            return False
        return True

    def _no_room(self, wrong: str = "") -> DiskSpaceError:
        return DiskSpaceError(
            wrong or f"the disk of {self._archive} is full",
            todo="make room, or keep fewer snapshots: --keep; those that are there can be restored",
        )


def _other_files(home: Path) -> list[Path]:
    """What somebody put beside the folders: settings, key files."""
    files = [path for path in home.iterdir() if path.is_file() and not path.is_symlink()]
    return sorted(path for path in files if not path.name.endswith(_NOT_COPIED) and not path.name.startswith("."))


def _needed_versions(registry: Registry, store: Store) -> set[VersionId]:
    """What an alias, a desired state, a rollback, an adapter or a swap under way needs.

    Args:
        registry: the folder with the versions, and the copy of MLflow's database.
        store: the copy.
    """
    found: set[VersionId] = set()
    for name in {*registry.names(), *desired_names(store)}:
        found |= protected(registry, store, name).keys()
        swap = find_swap(store, name)
        if swap is not None and swap.result is None:
            found.add(swap.target.version)
    return found
