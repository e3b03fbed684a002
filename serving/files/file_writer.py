"""Writes a new file atomically: it is either completed or deleted."""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_MIN_AGE_S = 3600.0


class FileWriter:
    """Writes a new file.

    Attributes:
        bytes: number of bytes written so far.
        closed: whether the file is complete.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        fcntl.flock(self._file, fcntl.LOCK_EX)  # so that no cleanup mistakes the file for one left by a crash
        self._hash = hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def write(self, part: bytes) -> None:
        """Append to the file. Raises OSError if the disk is full."""
        self._file.write(part)
        self._hash.update(part)
        self.bytes += len(part)

    def close(self) -> str:
        """Sync the file to disk, close it, and return the SHA-256 hash of its contents."""
        self._file.flush()
        os.utime(self._file.fileno())  # `remove_unknown` leaves new files alone; the last write may be hours ago
        os.fsync(self._file.fileno())
        self._file.close()
        self.closed = True
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close the file without completing it."""
        with suppress(OSError):  # the rest does not fit on a full disk
            self._file.close()


def remove_left(path: Path) -> bool:
    """Delete a file unless it is being written or is less than an hour old. Return whether it was deleted."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        if time.time() - os.fstat(file.fileno()).st_mtime > _MIN_AGE_S:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            return True
    return False


@contextmanager
def writing_file(path: Path) -> Iterator[FileWriter]:
    """Yield a writer for a new file. If an error occurs, the partial file is deleted."""
    writer = FileWriter(path)
    try:
        yield writer
    except BaseException:
        writer.abandon()
        path.unlink(missing_ok=True)
        raise
