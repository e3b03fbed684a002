"""The contents of clients' files, in a folder of the home. Their rows are in the store (svc.store.files).

A file's path is made from its id, never from anything that a client sent.
"""

import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Engine as Store

from svc.files.disk import sync_folder
from svc.store.files import (
    ClientFile,
    FileStatus,
    Purpose,
    StorageLimits,
    add_file,
    known_files,
    remove_expired_files,
    remove_unused_file,
)

FILES_FOLDER = "files"
"""Folder of the home with the contents."""
_MIN_AGE_S = 3600.0


class FileWriter:
    """Writes the content of a new file.

    Attributes:
        bytes: number of bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        fcntl.flock(self._file, fcntl.LOCK_EX)  # so that no cleanup takes the file for one that a crash has left
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, part: bytes) -> None:
        """Append to the content. Raises OSError if the disk is full."""
        self._file.write(part)
        self._hash.update(part)
        self.bytes += len(part)

    def close(self) -> str:
        """Complete the file on disk, and return the hash of its content."""
        self._file.flush()
        os.utime(self._file.fileno())  # `remove_unknown` leaves new files alone; the last write may be hours ago
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close the file, which is incomplete."""
        with suppress(OSError):  # the rest does not fit on a full disk
            self._file.close()


def remove_left(path: Path) -> bool:
    """Delete a file unless it is being written or younger than an hour, and return whether it was deleted."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        if time.time() - os.fstat(file.fileno()).st_mtime > _MIN_AGE_S:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            return True
    return False


@contextmanager
def writing_file(path: Path) -> Iterator[FileWriter]:
    """Yield a writer for a new file. An error deletes what was written."""
    writer = FileWriter(path)
    try:
        yield writer
    except BaseException:
        writer.abandon()
        path.unlink(missing_ok=True)
        raise


class ClientFiles:
    """Clients' files.

    Args:
        folder: folder for the contents, which is created if it does not exist.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, id: str) -> Path:
        """Return the path of a file's content on this machine.

        Args:
            id: id of a file that exists, see `svc.store.files.find_file`.
        """
        return self._folder / id

    @contextmanager
    def writing(self, id: str | None = None) -> Iterator[tuple[str, FileWriter]]:
        """Yield a new id, and a writer for that file's content. An error deletes what was written.

        Args:
            id: the id to use, for a file that may have been written in part before a crash. It has no row yet.
        """
        path = self._folder / (id or f"file-{secrets.token_hex(12)}")
        if id is not None:
            path.unlink(missing_ok=True)
        with writing_file(path) as writer:
            yield path.name, writer

    def add(
        self,
        id: str,
        writer: FileWriter,
        *,
        owner: str,
        purpose: Purpose,
        filename: str,
        status: FileStatus = FileStatus.UPLOADED,
        expires_after_s: int | None = None,
        limits: StorageLimits | None = None,
    ) -> ClientFile:
        """Add the file that a writer has written; call this as the last thing within `writing`.

        Args:
            limits: limits for all files of the owner, or None for no limits.

        Raises:
            StorageLimitError: the file exceeds a limit.
        """
        file = self.finish(
            id,
            writer,
            owner=owner,
            purpose=purpose,
            filename=filename,
            status=status,
            expires_after_s=expires_after_s,
        )
        add_file(self._store, file, limits)
        return file

    def finish(
        self,
        id: str,
        writer: FileWriter,
        *,
        owner: str,
        purpose: Purpose,
        filename: str,
        status: FileStatus = FileStatus.UPLOADED,
        expires_after_s: int | None = None,
    ) -> ClientFile:
        """Complete the content that a writer has written, and return the file, which is not in the store yet."""
        now = datetime.now(UTC)
        expires_at = None if expires_after_s is None else now + timedelta(seconds=expires_after_s)
        sha256 = writer.close()
        sync_folder(self._folder)
        return ClientFile(id, owner, purpose, filename, writer.bytes, sha256, now, expires_at, status)

    def delete(self, id: str, owner: str | None = None) -> None:
        """Delete a file.

        Args:
            owner: only a file of this owner is found; None for all owners.

        Raises:
            EntryNotFoundError: the owner has no file with this id.
            FileInUseError: a job or batch that has not ended needs the file.
        """
        remove_unused_file(self._store, id, owner)
        self.path(id).unlink(missing_ok=True)

    def remove_expired(self) -> int:
        """Delete the files that have expired and that no job or batch needs, and return their number."""
        ids = remove_expired_files(self._store, datetime.now(UTC))
        for id in ids:
            self.path(id).unlink(missing_ok=True)
        return len(ids)

    def remove_unknown(self) -> int:
        """Delete contents without a row, which a crash has left, and return their number.

        Contents that are being written or are younger than an hour are left alone. If no content at all has a row,
        nothing is deleted: the server probably runs with another store than the one that the contents belong to.
        """
        names = [path.name for path in self._folder.iterdir()]
        known = known_files(self._store, names)
        unknown = [self._folder / name for name in names if name not in known] if known else []
        return sum(remove_left(path) for path in unknown)
