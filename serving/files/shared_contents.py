"""The contents of clients' files in an object store (`artifacts.url`), which all servers with the same store share.

    client-files/ID    the contents of one file, which never change

A server that lacks a file's contents downloads them to a folder in its home folder. This copy is removed when the
file is deleted, or when it has not been used for a day and no job or batch needs it.
"""

import errno
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path, PurePosixPath

from sqlalchemy import Engine as Store

from serving.files.file_writer import remove_left
from serving.files.rows import FileContent, known_files, needed_files
from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import IntegrityError, RegistryError, SvcError
from svc.files.disk import sync_folder
from svc.registry.files import FileRecord
from svc.registry.objects import ObjectStore

log = logging.getLogger(__name__)

COPIES_FOLDER = "fetched-files"
"""Folder in the home folder that contains file contents fetched from the object store."""
_PREFIX = "client-files"
_RETRY_S = 10
_UNUSED_S = 86_400.0
_LARGE, _MAX_LARGE = 2**23, 4
"""Minimum size, in bytes, of contents that are copied in parts, and maximum number of such copies at a time. Each copy
takes about 75 MB of memory, measured with a 500 MB file."""


@answered_with(503, ErrorCode.FILE_CONTENT_MISSING)
class ContentMissingError(SvcError):
    """Raised when a file's contents are neither on this machine nor in an object store. Clients see the message."""


class ContentDamagedError(ContentMissingError):
    """Raised when a file's contents in the object store were truncated or altered. Clients see the message."""


@answered_with(503, ErrorCode.STORE_UNAVAILABLE)
class ContentStoreError(SvcError):
    """Raised when the object store is not responding, or rejects a request. Clients see the message.

    Attributes:
        retry_after_s: seconds after which clients should retry.
    """

    retry_after_s = _RETRY_S


class SharedContents:
    """Contents of clients' files in an object store.

    Args:
        folder: folder for fetched contents, which is created if it does not exist.
        min_free_bytes: disk space that must remain free after a fetch, in bytes.
    """

    def __init__(self, objects: ObjectStore, folder: Path, *, min_free_bytes: int = 0) -> None:
        self._objects = objects
        self._folder = folder
        self._min_free_bytes = min_free_bytes
        self._large = threading.BoundedSemaphore(_MAX_LARGE)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, content: FileContent, path: Path) -> None:
        """Upload a file's contents.

        Raises:
            ContentStoreError: the store is not responding, or rejects the request.
            IntegrityError: the file on this machine does not match its hash.
        """
        with self._asking(content), self._slot(content):
            self._objects.send_file(_key(content.id), _record(content), path)

    def delete(self, ids: Collection[str]) -> None:
        """Delete the contents of the files with these ids. Ids that do not exist are ignored.

        Raises:
            ContentStoreError: the store is not responding, or rejects the request.
        """
        with self._asking():
            self._objects.delete([_key(id) for id in ids])

    def ids(self) -> set[str]:
        """Return the ids of all files in the object store, including files that are recorded in other databases.

        Raises:
            ContentStoreError: the store is not responding, or rejects the request.
        """
        with self._asking():
            return {PurePosixPath(key).name for key in self._objects.keys(_PREFIX)}

    def find_copy(self, id: str) -> Path | None:
        """Return the path of a file's fetched copy and mark the copy as used. Return None if there is no copy."""
        path = self._folder / id
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def fetch(self, content: FileContent) -> Path:
        """Download a file's contents and return their path.

        The contents appear under this path only after their size and hash have been verified.

        Raises:
            ContentMissingError, ContentDamagedError: the store does not have the contents, or they were truncated or
                altered.
            ContentStoreError: the store is not responding, or rejects the request.
            OSError: the disk is full.
        """
        path = self._folder / content.id
        partial = self._folder / f".{content.id}.{secrets.token_hex(4)}"  # another process may fetch the same contents
        if shutil.disk_usage(self._folder).free - content.bytes < self._min_free_bytes:
            raise OSError(errno.ENOSPC, f"not enough free disk space for {content.bytes} bytes", str(path))
        with self._asking(content), self._slot(content):
            if self._objects.size(_key(content.id)) is None:
                raise ContentMissingError(f"the content of file {content.id} is not in the server's object store")
            self._objects.receive_file(_key(content.id), _record(content), partial)
        os.utime(partial)
        partial.replace(path)
        sync_folder(self._folder)
        return path

    def remove_copies(self, store: Store) -> None:
        """Delete the local copy of each file that no longer exists in the store. Also delete copies that no unfinished
        job or batch needs and that have not been used for a day.
        """
        names = [path.name for path in self._folder.iterdir()]
        whole = [name for name in names if not name.startswith(".")]
        known, needed = known_files(store, whole), needed_files(store, whole)
        for name in names:
            path = self._folder / name
            if name not in whole:
                remove_left(path)
            elif name not in known or (name not in needed and _is_unused(path)):
                path.unlink(missing_ok=True)

    def _slot(self, content: FileContent) -> AbstractContextManager[object]:
        return self._large if content.bytes > _LARGE else nullcontext()

    @contextmanager
    def _asking(self, content: FileContent | None = None) -> Iterator[None]:
        """Convert the object store's errors, which name its URL, to errors that clients may see."""
        try:
            yield
        except IntegrityError as error:
            if content is None or _key(content.id) not in error.wrong:
                raise
            log.error("ignoring the content of a file in the object store: %s", error)
            raise ContentDamagedError(
                f"the content of file {content.id} in the server's object store was truncated or altered: "
                f"{_key(content.id)}",
                expected=f"sha256 {content.sha256[:12]}…, {content.bytes} bytes",
                todo="upload the file again",
            ) from None
        except RegistryError as error:
            log.error("%s", error)
            raise ContentStoreError(
                "the server's object store for files is not responding", todo="retry the request later"
            ) from None


def _key(id: str) -> str:
    return f"{_PREFIX}/{id}"


def _record(content: FileContent) -> FileRecord:
    return FileRecord(path=content.id, sha256=content.sha256, bytes=content.bytes)


def _is_unused(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _UNUSED_S
    except FileNotFoundError:
        return False
