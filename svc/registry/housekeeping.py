"""Frees disk: versions that nobody needs, what runs, sweeps, logs and caches have left. Never what may be served again.

A version is needed where an alias means it, where a name serves it or is about to, where a rollback would go, and where
one of these is an adapter and it is the base. A version that a server has loaded beside these as an adapter is not: the
server lets it go when it is removed.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine as Store

from svc.errors import BusyError, IntegrityError, NotFoundError
from svc.files.lock import hold_lock, lock_holder
from svc.registry.registry import Registry
from svc.registry.training_runs import RUN_LOCK, RUNS_FOLDER, SWEEPS_FOLDER
from svc.store.desired import desired_names, read_desired
from svc.store.swaps import find_swap
from svc.version import Format, VersionId

log = logging.getLogger(__name__)

_DAY_S = 86_400
_REGISTERED = "register.json"
"""In the folder of a run that is finished (trainer.pipeline.run_folder); its weights lie in folders named by format."""
_REMOVING = ".removing"
"""Beside the versions of a name: held by whoever removes one."""


@dataclass(frozen=True, slots=True)
class Reclaimable:
    """Something that can go.

    Attributes:
        size: bytes on the disk; files that something else shares are counted with that.
        why: why nobody needs it.
        touched: when something in it was changed last, seconds since the epoch.
    """

    path: Path
    size: int
    why: str
    touched: float


def protected(registry: Registry, store: Store, name: str) -> dict[VersionId, str]:
    """The versions of a name that must stay, each with the reason."""
    found = {version: f"has the alias {alias}" for alias, version in registry.tracking.aliases(name).items()}
    desired = read_desired(store, name)
    if desired is not None:
        if desired.previous is not None:
            found[desired.previous.version] = "is where a rollback goes"
        found[desired.target.version] = "is served, or is about to be"
    return _bases(registry, store, name) | found


def _bases(registry: Registry, store: Store, name: str) -> dict[VersionId, str]:
    """The versions of a name that are bases of adapters which some name serves, or would after a rollback."""
    found: dict[VersionId, str] = {}
    wishes = [wish for of in desired_names(store) if (wish := read_desired(store, of))]
    for target in [target for wish in wishes for target in (wish.previous, wish.target) if target]:
        if target.format is Format.ADAPTER:
            with suppress(NotFoundError, IntegrityError):  # it is gone or damaged: what its base was, nobody knows
                base = VersionId.parse(registry.manifest(target.version).base.origin)
                if base.name == name:
                    found[base] = f"is the base of the adapter {target.version}"
    return found


def remove_version(registry: Registry, store: Store, version: VersionId) -> int:
    """Removes a version with all its files; its number stays used. Returns the bytes that are free now.

    Raises:
        NotFoundError: there is no such version.
        BusyError: it is needed.
    """
    if version not in registry.versions(version.name):
        registry.manifest(version)
    folder = registry.folder(version)
    run = _run_of(registry, version)
    hidden = folder.with_name(f".removed-{version.number}")
    with hold_lock(folder.parent / _REMOVING, f"removing versions of {version.name}"):
        _refuse(registry, store, version)
        shutil.rmtree(hidden, ignore_errors=True)  # of a removal that was cut off
        os.utime(folder)  # renamed, it would be as old as the version to whoever looks for leftovers
        folder.rename(hidden)  # from here on nobody can choose it
        try:
            _refuse(registry, store, version)  # somebody may have, just before
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
    """The folder of the run that made a version; None of a damaged version, or where the folder has gone."""
    try:
        folder = registry.models.parent / RUNS_FOLDER / registry.manifest(version).run
    except IntegrityError:
        log.warning("%s cannot be read: what its run has left stays", version, exc_info=True)
        return None
    return folder if folder.is_dir() else None


def _drop_weights(run: Path) -> None:
    """Removes a run's names for the weights that the registry had, so that they are free; not while it is worked on."""
    try:
        with hold_lock(run / RUN_LOCK, f"the run {run.name}"):
            for format in Format:
                shutil.rmtree(run / format.value, ignore_errors=True)
    except BusyError:
        log.warning("%s is worked on: its weights stay", run)


def _refuse(registry: Registry, store: Store, version: VersionId) -> None:
    swap = find_swap(store, version.name)
    if swap is not None and swap.result is None:
        # Whether it succeeds decides where a rollback goes.
        raise BusyError(f"{version.name} is being changed to {swap.target}", todo="wait for it: see `svc status`")
    reason = protected(registry, store, version.name).get(version)
    if reason:
        raise BusyError(
            f"{version} {reason}",
            expected="a version that no alias, no server and no rollback needs",
            todo="promote another version first; see `svc status` and `svc models`",
        )


def find_reclaimable(registry: Registry, home: Path, older_than_days: float) -> Iterator[Reclaimable]:
    """What interrupted work and time have left.

    Runs and sweeps that were not finished can go on, and a rotated log may still be read: all are kept for some days.
    Whatever a process works on is passed over.
    """
    now = time.time()
    before = now - older_than_days * _DAY_S
    for path, why in _leftovers(registry.models, home):
        touched = _newest(path, now)
        if touched < (min(before, now - _DAY_S) if path.parent.parent == registry.models else before):
            yield Reclaimable(path, size_on_disk(path), why, touched)


def _leftovers(models: Path, home: Path) -> Iterator[tuple[Path, str]]:
    """All that nobody works on, whatever its age, each with why nobody needs it."""
    for folder in _folders(models.glob("*/.*")):  # a registration takes minutes, and less than a day
        yield folder, "a registration or a removal was cut off"
    for folder in _folders((home / RUNS_FOLDER).glob("*")):
        if lock_holder(folder / RUN_LOCK) is None:
            finished = "the version is registered" if (folder / _REGISTERED).is_file() else "the run was given up"
            yield folder, f"{finished}, and nobody has touched it since"
    for folder in _folders((home / SWEEPS_FOLDER).glob("*")):
        if lock_holder(folder / RUN_LOCK) is None:
            yield folder, "trials that nobody has touched since"
    for path in sorted((home / "logs").glob("*.log.*")):
        yield path, "a log that was rotated"
    for path in sorted((home / "cache").glob("*/*")):
        if path.name != _REMOVING and not path.is_symlink():
            yield path, "a cache that is made again where it is needed"


def reclaim(found: Reclaimable) -> None:
    """Removes it, if it is still what was found. A folder goes as a whole: no part of a run passes for a finished one.

    Raises:
        BusyError: somebody has taken it up meanwhile.
    """
    path = found.path
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    lock = path / RUN_LOCK if path.parent.name in (RUNS_FOLDER, SWEEPS_FOLDER) else path.parent / _REMOVING
    with hold_lock(lock, str(path)):
        if _newest(path, time.time()) > found.touched:
            raise BusyError(f"{path} was changed just now", todo="nothing: it is kept")
        hidden = path if path.name.startswith(".removed-") else path.with_name(f".removed-{path.name}")
        path.rename(hidden)
        shutil.rmtree(hidden)


def _folders(found: Iterator[Path]) -> list[Path]:
    """Links are somebody's own arrangement, and stay."""
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def _newest(path: Path, now: float) -> float:
    """When something in it was changed last; the lock of a run is written by whoever looks at it."""
    try:
        return max(one.lstat().st_mtime for one in (path, *path.rglob("*")) if one.name != RUN_LOCK)
    except FileNotFoundError:  # it is being published, or rotated
        return now


def size_on_disk(path: Path) -> int:
    """Bytes that are free when it has gone: a file with another name elsewhere stays."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files if file.stat().st_nlink == 1)
