"""Copies files in such a way that each copy is either complete and verified, or absent.

Versions and clients' files never change, so all snapshots share one copy of each.
"""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from serving.files.rows import FileContent
from svc.errors import IntegrityError
from svc.files.disk import sync_folder
from svc.registry.files import FileRecord, record_file, verify_files
from svc.registry.manifest import MANIFEST_FILE, Manifest, read_manifest

_AT_ONCE = 2**22  # bytes
_BUSY_S = 30.0

OnBytes = Callable[[int], None]
Progress = Callable[[int], AbstractContextManager[OnBytes]]
"""Function that takes the total number of bytes to copy and returns a context manager. The context manager yields a
callback that must be called with the number of bytes copied in each step."""
Copy = tuple[int, Callable[[OnBytes], None]]
"""Number of bytes to copy, and the function that copies them."""
Key = TypeVar("Key")


@contextmanager
def no_progress(total: int) -> Iterator[OnBytes]:
    """Yield a callback that does not report any progress."""
    yield lambda count: None


def copy_all(copies: Mapping[Key, Copy], progress: Progress) -> dict[Key, FileNotFoundError | IntegrityError]:
    """Make all copies that can be made, and return the errors of the others, by key."""
    errors: dict[Key, FileNotFoundError | IntegrityError] = {}
    with progress(sum(size for size, _ in copies.values())) as on_bytes:
        for key, (_, copy) in copies.items():
            try:
                copy(on_bytes)
            except (FileNotFoundError, IntegrityError) as error:
                errors[key] = error
    return errors


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
    return all(has_content(target / file.path, file, verify=verify) for file in manifest.files)


def has_content(path: Path, record: FileRecord | FileContent, *, verify: bool = False) -> bool:
    """Return whether a file exists and has the recorded size.

    Args:
        verify: whether to also check its hash.
    """
    if not path.is_file() or path.stat().st_size != record.bytes:
        return False
    return not verify or record_file(path.parent, path).sha256 == record.sha256


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


def copy_content(content: FileContent, source: Path, target: Path, on_bytes: OnBytes) -> None:
    """Copy the contents of a client's file so that only the copy's owner can read them, and verify the copy. A valid
    copy, for example one that was made for another file with these contents, is kept.

    Args:
        on_bytes: function called with the number of bytes copied in each step.

    Raises:
        FileNotFoundError: there is no such file.
        IntegrityError: the file does not match its hash.
    """
    if has_content(target, content, verify=True):
        return
    staging = target.with_name(f".{target.name}")
    try:
        copy_file(source, staging, on_bytes)
        staging.chmod(0o600)
        if not has_content(staging, content, verify=True):
            raise IntegrityError(f"{source} does not match its hash", todo="restore it from an older snapshot")
        os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)


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
