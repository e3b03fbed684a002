"""Frees disk: versions that nobody needs, and what runs and logs have left. Never what is served or may be again.

A version is needed where an alias means it, where a name serves it or is about to, and where a rollback would go.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from svc.errors import BusyError
from svc.lock import hold_lock, lock_holder
from svc.registry.registry import Registry
from svc.registry.version import VersionId
from svc.store.desired import read_desired

_DAY_S = 86_400
_LOCK, _REGISTERED = "lock", "register.json"
"""Of a run's folder (trainer.run)."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that can go.

    Attributes:
        size: bytes on the disk; files that something else shares are counted with that.
        why: why nobody needs it.
    """

    path: Path
    size: int
    why: str


def needs(registry: Registry, store: Engine, name: str) -> dict[VersionId, str]:
    """The versions of a name that must stay, each with the reason."""
    found = {version: f"has the alias {alias}" for alias, version in registry.tracking.aliases(name).items()}
    desired = read_desired(store, name)
    if desired is not None:
        if desired.previous is not None:
            found[desired.previous.version] = "is where a rollback goes"
        found[desired.target.version] = "is served, or is about to be"
    return found


def remove_version(registry: Registry, store: Engine, version: VersionId) -> int:
    """Removes a version with all its files; its number stays used. Returns the bytes that are free now.

    Raises:
        NotFoundError: there is no such version.
        BusyError: it is needed.
    """
    if version not in registry.versions(version.name):
        registry.manifest(version)
    _refuse(registry, store, version)
    folder = registry.folder(version)
    hidden = folder.with_name(f".removed-{version.number}")
    shutil.rmtree(hidden, ignore_errors=True)  # of a removal that was cut off
    folder.rename(hidden)  # from here on nobody can choose it
    try:
        _refuse(registry, store, version)  # somebody may have, just before
        registry.tracking.discard(version)
    except BaseException:
        hidden.rename(folder)
        raise
    size = size_on_disk(hidden)
    shutil.rmtree(hidden)
    return size


def _refuse(registry: Registry, store: Engine, version: VersionId) -> None:
    reason = needs(registry, store, version.name).get(version)
    if reason:
        raise BusyError(
            f"{version} {reason}",
            expected="a version that no alias, no server and no rollback needs",
            todo="promote another version first; see `svc status` and `svc models`",
        )


def find_leftovers(registry: Registry, home: Path, older_than_days: float) -> Iterator[Leftover]:
    """What interrupted work and time have left.

    Runs that were not finished can go on, and a rotated log may still be read: both are kept for some days. Whatever a
    process works on is passed over.
    """
    before = time.time() - older_than_days * _DAY_S
    for folder in _folders(registry.models.glob("*/.*")):
        if _newest(folder) < min(before, time.time() - _DAY_S):  # a registration takes minutes
            yield Leftover(folder, size_on_disk(folder), "a registration or a removal was cut off")
    for folder in _folders((home / "runs").glob("*")):
        if lock_holder(folder / _LOCK) is None and _newest(folder) < before:
            finished = (folder / _REGISTERED).is_file()
            why = "the version is registered" if finished else "the run was given up"
            yield Leftover(folder, size_on_disk(folder), f"{why}, and nobody has touched it since")
    for path in sorted((home / "logs").glob("*.log.*")):
        if path.stat().st_mtime < before:
            yield Leftover(path, size_on_disk(path), "a log that was rotated")


def remove_leftover(leftover: Leftover) -> None:
    """Removes it.

    Raises:
        BusyError: it is a run that somebody has taken up meanwhile.
    """
    if not leftover.path.is_dir():
        leftover.path.unlink(missing_ok=True)
    elif (leftover.path / _LOCK).exists():
        with hold_lock(leftover.path / _LOCK, f"the run {leftover.path.name}"):
            shutil.rmtree(leftover.path)
    else:
        shutil.rmtree(leftover.path)


def _folders(found: Iterator[Path]) -> list[Path]:
    return sorted(path for path in found if path.is_dir())


def _newest(folder: Path) -> float:
    """When something in it was changed last."""
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def size_on_disk(path: Path) -> int:
    """Bytes that are free when it has gone: a file with another name elsewhere stays."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files if file.stat().st_nlink == 1)
