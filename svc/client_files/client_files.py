"""The contents of clients' files, in a folder of the home. Their rows are in the store (svc.store.files).

A file's path is made from its id, never from anything that a client sent.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Engine as Store

from svc.store.files import ClientFile, FileStatus, Purpose, add_file, remove_file


class FileWriter:
    """Writes the content of a new file.

    Attributes:
        bytes: number of bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
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
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        self._file.close()


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
        writer = FileWriter(path)
        try:
            yield path.name, writer
        except BaseException:
            writer.abandon()
            path.unlink(missing_ok=True)
            raise

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
    ) -> ClientFile:
        """Add the file that a writer has written; call this as the last thing within `writing`."""
        now = datetime.now(UTC)
        expires_at = None if expires_after_s is None else now + timedelta(seconds=expires_after_s)
        file = ClientFile(
            id, owner, purpose, filename, writer.bytes, writer.close(), now, expires_at=expires_at, status=status
        )
        add_file(self._store, file)
        return file

    def delete(self, id: str) -> None:
        """Delete a file that exists."""
        remove_file(self._store, id)
        self.path(id).unlink(missing_ok=True)
