"""Writes files atomically and detects a full disk.

Even if the process is killed or the power fails, a written file is either complete or absent. This module knows
nothing about the files' contents.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_FULL = 1_000_000  # bytes; a disk with less cannot take another file of weights


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically. A temporary file in the same folder is synced, then renamed to the path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder's directory entries, so that they survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Sync a folder's files and directory entries, so that they survive a power loss."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def close_to_others(folder: Path, marks: Iterable[str]) -> None:
    """Revoke other users' access to one of this service's folders, and thereby to its contents. Do nothing if there is
    no such folder.

    A shared folder such as /tmp, or a folder with other content, is left unchanged, even if it is configured
    as the home folder.

    Args:
        marks: file names by which the service's own folders are recognized. A folder must be empty or contain
            at least one of them.
    """
    with suppress(FileNotFoundError):
        status, names = folder.stat(), set(os.listdir(folder))
        shared = status.st_mode & (stat.S_IWOTH | stat.S_ISVTX)
        ours = status.st_uid == os.getuid() and not shared and (not names or names & set(marks))
        if ours and status.st_mode & 0o077:
            folder.chmod(0o700)


def is_full(error: Exception, folder: Path) -> bool:
    """Return whether an error means that the disk or the user's quota is full.

    Libraries report a full disk in different ways. For example, torch reports a truncated write as an
    unexpected file position.

    Args:
        folder: folder that was written to.
    """
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    message = str(error)
    cut_off = "unexpected pos" in message and shutil.disk_usage(folder).free < _FULL
    return cut_off or "No space left" in message or "os error 28" in message
