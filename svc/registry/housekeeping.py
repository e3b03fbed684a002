"""Frees disk space by removing unneeded versions, and old files of runs, sweeps, jobs, batches, logs and caches.

A needed version is never removed. A version is needed if it has an alias, is or will be served, or is the target of a
rollback. The base of a needed adapter version is needed too. A version that a server has loaded only as an additional
adapter does not count as needed. The server unloads it after the removal.

With an object store (`artifacts.url`), the home folder is a cache: weights that are also in the store can be evicted,
and are downloaded again when they are needed.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine as Store
from sqlalchemy import select

from svc.errors import BusyError, IntegrityError, NotFoundError
from svc.files.lock import hold_lock, lock_holder
from svc.registry.objects import manifest_key
from svc.registry.registry import Registry
from svc.registry.training_runs import RUN_LOCK, RUNS_FOLDER, SWEEPS_FOLDER, find_training_runs
from svc.store.desired import desired_names, read_desired
from svc.store.rollouts import active_rollout
from svc.store.statuses import BatchStatus, JobStatus
from svc.store.swaps import unfinished_swaps
from svc.store.tables import BatchRow, JobRow
from svc.version import Format, VersionId

log = logging.getLogger(__name__)

_DAY_S = 86_400
_UNUSED_S = 3600
"""Weights are not evicted within this many seconds of their last use, because an engine may be loading them."""
_REGISTERED = "register.json"
"""File whose presence in a run's folder shows that the run is finished (see trainer.pipeline.run_folder). The run's
weights are in one subfolder per format."""
_REMOVED = ".removed-"
_REMOVING = ".removing"
"""Lock file in a model's versions folder, held while a version is being removed."""


@dataclass(frozen=True, slots=True)
class Reclaimable:
    """A file or folder that can be deleted.

    Attributes:
        size: number of bytes that deleting it would free.
        why: why the file or folder is not needed.
        touched: time of the last change to the contents, in seconds since the epoch.
    """

    path: Path
    size: int
    why: str
    touched: float


def protected(registry: Registry, store: Store, name: str) -> dict[VersionId, str]:
    """Return a model's versions that must not be removed, with the reason for each."""
    reasons = {version: f"has alias {alias}" for alias, version in registry.tracking.aliases(name).items()}
    desired = read_desired(store, name)
    if desired is not None:
        if desired.previous is not None:
            reasons[desired.previous.version] = "is the target of a rollback"
        reasons[desired.target.version] = "is served, or soon will be"
    return _bases(registry, store, name) | reasons


def _bases(registry: Registry, store: Store, name: str) -> dict[VersionId, str]:
    """Return the versions of a model that must not be removed because they are the bases of adapters that are served,
    or that a rollback would serve again. Each version is mapped to the reason as text.
    """
    reasons: dict[VersionId, str] = {}
    states = [state for desired in desired_names(store) if (state := read_desired(store, desired))]
    for target in [target for state in states for target in (state.previous, state.target) if target]:
        if target.format is Format.ADAPTER:
            with suppress(NotFoundError, IntegrityError):  # missing or damaged: its base is unknown
                base = VersionId.parse(registry.manifest(target.version).base.origin)
                if base.name == name:
                    reasons[base] = f"is the base of adapter {target.version}"
    return reasons


def remove_version(registry: Registry, store: Store, version: VersionId) -> int:
    """Remove a version and all its files, and return the number of bytes freed. Its number is not reused.

    Raises:
        NotFoundError: there is no such version.
        BusyError: the version is in use or is the target of a rollback, or is still in the object store.
        RegistryError: the object store is not responding.
    """
    if version not in registry.versions(version.name):
        registry.manifest(version)
    if registry.objects is not None and version in registry.objects.versions(version.name):
        raise BusyError(
            f"{version} is in the object store {registry.objects.url}, from which it would be fetched again",
            expected="a version that exists only in this home folder",
            todo="set artifacts.cache_gb and run `svc gc` to free disk space here; to remove the version from all "
            f"machines, first delete {manifest_key(version)} from the object store",
        )
    folder = registry.folder(version)
    run = _run_of(registry, version)
    hidden = folder.with_name(f".removed-{version.number}")
    with hold_lock(folder.parent / _REMOVING, f"the versions folder of {version.name}"):
        _refuse(registry, store, version)
        shutil.rmtree(hidden, ignore_errors=True)  # of an interrupted removal
        os.utime(folder)  # else the renamed folder would have the version's age in a search for leftovers
        folder.rename(hidden)  # from now on, it cannot be chosen
        try:
            _refuse(registry, store, version)  # it may have been chosen just before
            registry.tracking.discard(version)
        except BaseException:
            hidden.rename(folder)
            raise
        if run is not None:
            _drop_weights(run)
        size = size_on_disk(hidden)
        shutil.rmtree(hidden)
    return size


def _run_of(registry: Registry, version: VersionId) -> Path | None:
    """Return the folder of the run that created a version, or None if the folder is missing or the manifest is
    damaged.
    """
    try:
        folder = registry.models.parent / RUNS_FOLDER / registry.manifest(version).run
    except IntegrityError:
        log.warning("could not read the manifest of %s; keeping the files of its training run", version, exc_info=True)
        return None
    return folder if folder.is_dir() else None


def _drop_weights(run: Path, formats: Iterable[Format] = Format) -> None:
    """Delete a run's links to weights that were removed from its version, to free the disk space. If the run is active,
    keep the links.
    """
    try:
        with hold_lock(run / RUN_LOCK, f"the run {run.name}"):
            for format in formats:
                shutil.rmtree(run / format.value, ignore_errors=True)
    except BusyError:
        log.warning("%s is active, so its weights are kept", run)


def _refuse(registry: Registry, store: Store, version: VersionId) -> None:
    for swap in unfinished_swaps(store, version.name):
        # Its outcome determines the target of a rollback.
        raise BusyError(
            f"{version.name} is already being swapped to {swap.target}",
            todo="wait until the swap ends; check svc status",
        )
    rollout = active_rollout(store, version.name)
    if rollout is not None and version in (rollout.previous.version, rollout.target.version):
        raise BusyError(f"{version} is part of a rollout", todo="wait until the rollout ends; check svc rollout")
    reason = protected(registry, store, version.name).get(version)
    if reason:
        raise BusyError(
            f"{version} {reason}",
            expected="a version that no alias, server or rollback needs",
            todo="promote another version first; check `svc status` and `svc models`",
        )


def find_reclaimable(registry: Registry, home: Path, older_than_days: float) -> Iterator[Reclaimable]:
    """Yield files and folders that can be deleted: leftovers of interrupted work, and old files.

    Unfinished runs and sweeps could still be resumed, and a rotated log might still be read, so everything
    is kept for `older_than_days` days after its last change. Files in use by a process are skipped.
    """
    now = time.time()
    before = now - older_than_days * _DAY_S
    for path, why in _leftovers(registry.models, home):
        touched = _newest(path, now)
        if touched < (min(before, now - _DAY_S) if path.parent.parent == registry.models else before):
            yield Reclaimable(path, size_on_disk(path), why, touched)


def _leftovers(models: Path, home: Path) -> Iterator[tuple[Path, str]]:
    """Yield every leftover file or folder that is not in use, regardless of age, with the reason why it is not
    needed.
    """
    for folder in _folders(models.glob("*/.*")):  # a registration takes minutes, less than a day
        yield folder, "left by an interrupted registration or removal"
    for folder in _folders((home / RUNS_FOLDER).glob("*")):
        if lock_holder(folder / RUN_LOCK) is None:
            finished = "the version is registered" if (folder / _REGISTERED).is_file() else "the run is unfinished"
            yield folder, f"{finished}, and its files have not changed recently"
    for folder in _folders((home / SWEEPS_FOLDER).glob("*")):
        if lock_holder(folder / RUN_LOCK) is None:
            yield folder, "the sweep has not changed recently"
    for path in sorted((home / "logs").glob("*.log.*")):
        yield path, "a rotated log"
    for path in sorted((home / "cache").glob("*/*")):
        if path.name != _REMOVING and not path.is_symlink():
            yield path, "a cache that is recreated when needed"


def find_ended(store: Store, home: Path, older_than_days: float) -> Iterator[Reclaimable]:
    """Yield old folders of fine-tuning jobs and batches that have ended or are not recorded in the store.

    The folders are kept for `older_than_days` days after their last change. Folders of unrecorded jobs and batches are
    kept for at least a day, because the server that uses this home folder may have another store, in which they are
    running.
    """
    now = time.time()
    before = now - older_than_days * _DAY_S
    for parent, prefix, noun, row, kind in (
        ("jobs", "ftjob-", "job", JobRow, JobStatus),
        ("batches", "batch_", "batch", BatchRow, BatchStatus),
    ):
        for folder in _folders((home / parent).glob("*")):
            id, touched = folder.name.removeprefix(_REMOVED), _newest(folder, now)
            if not id.startswith(prefix) or touched >= before:
                continue
            with store.connect() as connection:
                status = connection.scalar(select(row.status).where(row.id == id))
            if status is None:
                ended, why = touched < now - _DAY_S, f"the {noun} is not in the store"
            else:
                ended, why = kind(status).ended, f"the {noun} has ended"
            if ended:
                yield Reclaimable(folder, size_on_disk(folder), why, touched)


def reclaim(item: Reclaimable) -> None:
    """Delete a file or folder unless it has changed since it was found.

    Folders are deleted as a whole, because a partly deleted run could look finished.

    Raises:
        BusyError: the item is in use, or was changed since it was found.
    """
    path = item.path
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    lock = path / RUN_LOCK if path.parent.name in (RUNS_FOLDER, SWEEPS_FOLDER) else path.parent / _REMOVING
    with hold_lock(lock, str(path)):
        if _newest(path, time.time()) > item.touched:
            raise BusyError(f"{path} was just changed", todo="no action is needed; the folder is kept")
        hidden = path if path.name.startswith(_REMOVED) else path.with_name(f"{_REMOVED}{path.name}")
        path.rename(hidden)
        shutil.rmtree(hidden)


def find_evictable(registry: Registry, store: Store, max_bytes: float) -> Iterator[Reclaimable]:
    """Yield the weights to evict from the home folder so that its versions take at most `max_bytes`, least recently
    used first.

    Only weights that are also in the object store are evicted. Weights are kept if their version is needed, if their
    model has a swap or rollout in progress, or if they were used in the last hour. While a training run is active, all
    weights are kept, because any version may be its base.

    Raises:
        RegistryError: the object store is not responding.
    """
    if registry.objects is None or any(run.running for run in find_training_runs(registry.models.parent)):
        return
    folders = _folders(path for version in registry.versions() for path in registry.folder(version).iterdir())
    formats = [folder for folder in folders if folder.name in set(Format)]
    excess = sum(_size(registry.folder(version)) for version in registry.versions()) - max_bytes
    for folder in sorted(formats, key=lambda path: path.stat().st_mtime):
        if excess <= 0:
            return
        version, used = VersionId(folder.parent.parent.name, int(folder.parent.name)), folder.stat().st_mtime
        with suppress(BusyError, NotFoundError, IntegrityError):
            _refuse(registry, store, version)
            size, manifest = _size(folder), registry.manifest(version)
            if size and time.time() - used > _UNUSED_S and registry.objects.has(manifest, Format(folder.name)):
                yield Reclaimable(folder, size, "also in the object store, and not used recently", used)
                excess -= size


def evict(registry: Registry, store: Store, item: Reclaimable) -> None:
    """Remove weights found by `find_evictable`, and the links to them in the folder of the run that created them.

    Raises:
        BusyError: the weights have been used since they were found, or the version is now needed.
    """
    folder = item.path
    version = VersionId(folder.parent.parent.name, int(folder.parent.name))
    hidden = folder.parent.with_name(f".removed-{version.number}-{folder.name}")
    with hold_lock(hidden.with_name(_REMOVING), str(folder)), registry.downloads_paused(version.name):
        _refuse(registry, store, version)
        if folder.stat().st_mtime > item.touched:
            raise BusyError(f"{folder} was just used", todo="no action is needed; the folder is kept")
        shutil.rmtree(hidden, ignore_errors=True)  # of an interrupted eviction
        folder.rename(hidden)
    if run := _run_of(registry, version):
        _drop_weights(run, [Format(folder.name)])
    shutil.rmtree(hidden)


def _size(folder: Path) -> int:
    """Return the number of bytes in a folder. Files that a run's folder also links to (hard links) are included,
    because an eviction removes those links too.
    """
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _folders(paths: Iterator[Path]) -> list[Path]:
    """Return the paths that are folders, sorted. Symbolic links are excluded: tuneserve creates none here, so they
    belong to the user.
    """
    return sorted(path for path in paths if path.is_dir() and not path.is_symlink())


def _newest(path: Path, now: float) -> float:
    """Return the time of the last change at or below a path. A run's lock file is ignored, because `reclaim` writes to
    that file when it takes the lock.
    """
    try:
        return max(entry.lstat().st_mtime for entry in (path, *path.rglob("*")) if entry.name != RUN_LOCK)
    except FileNotFoundError:  # it is being published or rotated
        return now


def size_on_disk(path: Path) -> int:
    """Return the number of bytes that deleting a path would free, excluding files with more than one hard link."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files if file.stat().st_nlink == 1)
