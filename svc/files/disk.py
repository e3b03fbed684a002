"""Files that are whole or not there, also after a kill or a power cut; and what a full disk looks like.

Knows nothing of what is in the files.
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
    """Writes a file beside its place, syncs it and renames it there: at any moment it is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Makes a folder's files survive a power cut, with their names."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def close_to_others(folder: Path, marks: Iterable[str]) -> None:
    """Takes a folder of ours, if it is there, from all other users, and with it what is in it.

    A folder that is everybody's, as /tmp, or that holds other things stays as it is, whoever calls it ours.

    Args:
        marks: names one of which stands in a folder of ours that is not empty.
    """
    with suppress(FileNotFoundError):
        found, names = folder.stat(), set(os.listdir(folder))
        everybodys = found.st_mode & (stat.S_IWOTH | stat.S_ISVTX)
        ours = found.st_uid == os.getuid() and not everybodys and (not names or names & set(marks))
        if ours and found.st_mode & 0o077:
            folder.chmod(0o700)


def is_full(error: Exception, folder: Path) -> bool:
    """Whether an error says that the disk is full, or the share of it that a user may fill.

    Libraries say it in their own words; torch reports a write that was cut off as a position that it did not expect.

    Args:
        folder: where was written.
    """
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    told = str(error)
    cut_off = "unexpected pos" in told and shutil.disk_usage(folder).free < _FULL
    return cut_off or "No space left" in told or "os error 28" in told
