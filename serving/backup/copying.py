"""Copies files in such a way that each copy is either complete and verified, or absent."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path

from svc.errors import IntegrityError
from svc.files.disk import sync_folder
from svc.registry.files import verify_files
from svc.registry.manifest import MANIFEST_FILE, Manifest, read_manifest

_AT_ONCE = 2**22  # bytes
_BUSY_S = 30.0

OnBytes = Callable[[int], None]
Progress = Callable[[int], AbstractContextManager[OnBytes]]
"""Function that takes the total number of bytes to copy and returns a context manager. The context manager yields a
callback that must be called with the number of bytes copied in each step."""


@contextmanager
def no_progress(total: int) -> Iterator[OnBytes]:
    """Yield a callback that does not report any progress."""
    yield lambda count: None


def is_copied(manifest: Manifest, target: Path, *, verify: bool = False) -> bool:
    """Return whether a complete copy of a version exists, with the same manifest and with files of the right size.

    Args:
        verify: whether to also check the files against their hashes.

    Raises:
        IntegrityError: the copy is a different version with the same model name and version number, or its manifest is
            damaged.
    """
    if not (target / MANIFEST_FILE).exists():
        return False
    if read_manifest(target) != manifest:
        raise IntegrityError(
            f"{target} differs from version {manifest.id} in this home folder",
            expected="a folder that contains only backups of this home folder",
            todo="choose another backup folder",
        )
    files = manifest.files
    paths = {target / file.path: file.bytes for file in files}
    if not all(path.is_file() and path.stat().st_size == size for path, size in paths.items()):
        return False
    try:
        verify_files(target, files if verify else ())
    except IntegrityError:
        return False
    return True


def copy_version(manifest: Manifest, source: Path, target: Path, on_bytes: OnBytes) -> None:
    """Copy a version's folder, and check the copy against the manifest.

    Args:
        on_bytes: function called with the number of bytes copied in each step.

    Raises:
        FileNotFoundError: the version no longer exists.
        IntegrityError: a file differs from the manifest.
    """
    staging = target.with_name(f".{target.name}")
    shutil.rmtree(staging, ignore_errors=True)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        try:
            shutil.copytree(source, staging, copy_function=partial(copy_file, on_bytes=on_bytes))
        except shutil.Error as error:
            if not source.exists():
                raise FileNotFoundError(source) from error
            raise
        verify_files(staging, manifest.files)
        shutil.rmtree(target, ignore_errors=True)  # a copy whose files have a different size
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync_folder(target.parent)


def copy_file(source: str | Path, target: str | Path, on_bytes: OnBytes = lambda count: None) -> None:
    """Copy a file with its permissions, and sync the copy to disk."""
    with open(source, "rb") as reading, open(target, "wb") as writing:
        os.fchmod(writing.fileno(), os.fstat(reading.fileno()).st_mode & 0o777)
        while part := reading.read(_AT_ONCE):
            writing.write(part)
            on_bytes(len(part))
        writing.flush()
        os.fsync(writing.fileno())


def copy_database(source: Path, target: Path) -> None:
    """Make a consistent copy of an SQLite database, even while it is being written to.

    The copy is made in a single step, because a copy in several steps would start over with every write.

    Raises:
        IntegrityError: the copy is damaged, which means that the database itself is damaged.
    """
    target.touch(mode=0o600)
    with (
        closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)) as reading,
        closing(sqlite3.connect(target)) as writing,
    ):
        try:
            reading.backup(writing)
            told = writing.execute("PRAGMA quick_check").fetchone()[0]
        except sqlite3.DatabaseError as error:
            told = str(error)
        if told != "ok":
            raise IntegrityError(f"the database {source} is damaged: {told}", todo="restore an older snapshot")
    with target.open("rb") as file:
        os.fsync(file.fileno())
