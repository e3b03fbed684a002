"""The contents of clients' files, in a folder of the home folder. Metadata is in the store (serving.files.rows).

With an object store (serving.files.shared_contents), a file's contents are uploaded before its row is added to the
store, and a server without the contents downloads them. Objects are deleted in the background.

    files/ID             contents of a file
    files/.removed-ID    marker: the file no longer exists, and its object must be deleted

A file's path is made from its id, never from anything that a client sent.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine as Store

from serving.files.file_writer import FileWriter, remove_left, writing_file
from serving.files.rows import (
    ClientFile,
    FileContent,
    FileStatus,
    Purpose,
    StorageLimits,
    add_file,
    find_content,
    known_files,
    read_contents,
    remove_expired_files,
    remove_unused_file,
)
from serving.files.shared_contents import COPIES_FOLDER, ContentMissingError, SharedContents
from svc.errors import IntegrityError
from svc.files.disk import sync_folder
from svc.registry.objects import ObjectStore, require_obstore
from svc.settings.settings import Settings

log = logging.getLogger(__name__)

FILES_FOLDER = "files"
"""Folder in the home folder that holds the contents of files."""
_REMOVED = ".removed-"
_MAX_THREADS = 4
Result = TypeVar("Result")


class ClientFiles:
    """Adds, finds, shares and deletes clients' files.

    Args:
        folder: folder for the files' contents; it is created if it does not exist.
        shared: the contents in an object store, or None if there is no object store.
    """

    def __init__(self, store: Store, folder: Path, shared: SharedContents | None = None) -> None:
        self._store = store
        self._folder = folder
        self._shared = shared
        self._fetching: dict[str, asyncio.Task[Path]] = {}
        self._threads = ThreadPoolExecutor(_MAX_THREADS, "files")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @classmethod
    def of(cls, settings: Settings, store: Store) -> "ClientFiles":
        """Return a `ClientFiles` for the home folder and the object store given in the settings.

        Raises:
            SettingsError: there is an object store, but its client is not installed.
        """
        url, min_free = settings.artifacts.url, int(settings.files.min_free_gb * 2**30)
        if url:
            require_obstore()
        shared = (
            SharedContents(ObjectStore(url), settings.home / COPIES_FOLDER, min_free_bytes=min_free) if url else None
        )
        return cls(store, settings.home / FILES_FOLDER, shared)

    @property
    def are_shared(self) -> bool:
        """Whether files are shared through an object store, from which this machine can fetch missing contents."""
        return self._shared is not None

    def path(self, id: str) -> Path:
        """Return the path at which this machine stores the contents of a file that it receives or writes."""
        return self._folder / id

    def find(self, id: str) -> Path | None:
        """Return the path of a file's contents on this machine, or None if this machine does not have them.

        Args:
            id: id of a file that exists, see `serving.files.rows.find_file`.
        """
        if (path := self.path(id)).is_file():
            return path
        return self._shared.find_copy(id) if self._shared else None

    async def content(self, id: str) -> Path:
        """Return the path of a file's contents. If this machine lacks them, they are fetched from the object store.

        Args:
            id: id of a file that exists, see `serving.files.rows.find_file`.

        Raises:
            EntryNotFoundError: the file has been deleted.
            ContentMissingError, ContentDamagedError: the contents do not exist anywhere, or were truncated or altered.
            ContentStoreError: the object store is not responding, or rejects the request.
            OSError: the disk is full.
        """
        if (path := await asyncio.to_thread(self.find, id)) is not None:
            return path
        if self._shared is None:
            raise ContentMissingError(
                f"the content of file {id} is not on this server",
                todo="ask the operator to set artifacts.url on all servers, so that they share files",
            )
        task = self._fetching.get(id)
        if task is None:
            task = self._fetching[id] = asyncio.create_task(self._fetch(id, self._shared))
            task.add_done_callback(lambda ended: self._fetched(id, ended))
        return await asyncio.shield(task)  # others may wait for the same contents

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Call a function that fetches or adds a file, and return its result.

        A dedicated thread pool is used, so that an object store that is not responding cannot block other work.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _fetch(self, id: str, shared: SharedContents) -> Path:
        content = await asyncio.to_thread(find_content, self._store, id)
        return await self.in_thread(partial(shared.fetch, content))

    def _fetched(self, id: str, task: asyncio.Task[Path]) -> None:
        del self._fetching[id]
        if not task.cancelled():
            task.exception()  # all waiting callers may be cancelled; asyncio would warn about the unread error

    @contextmanager
    def writing(self, id: str | None = None) -> Iterator[tuple[str, FileWriter]]:
        """Yield the id of a new file, and a writer for its contents. If an error occurs, the partial contents are
        deleted, including any in the object store.

        Args:
            id: id to use instead of a new one, for a file that may have been partly written before a crash. No row in
                the store may have this id yet.
        """
        path = self._folder / (id or f"file-{secrets.token_hex(12)}")
        if id is not None:
            path.unlink(missing_ok=True)
        with writing_file(path) as writer:
            try:
                yield path.name, writer
            except BaseException:
                if writer.closed:  # the object store may have the contents, even if it did not respond
                    self._delete_objects([path.name])
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
        record: Callable[[ClientFile], None] | None = None,
        limits: StorageLimits | None = None,
    ) -> ClientFile:
        """Add the file that a writer has written. This must be the last call within `writing`.

        Args:
            record: function that adds the file's row to the store; by default, `add_file` with `limits`.
            limits: limits for all files of the owner, or None for no limits.

        Raises:
            ContentStoreError: the object store is not responding, or rejects the request.
            StorageLimitError: the file exceeds a limit.
        """
        now = datetime.now(UTC)
        expires_at = None if expires_after_s is None else now + timedelta(seconds=expires_after_s)
        sha256 = writer.close()
        sync_folder(self._folder)
        if self._shared is not None:
            self._shared.put(FileContent(id, writer.bytes, sha256), self.path(id))
        file = ClientFile(id, owner, purpose, filename, writer.bytes, sha256, now, expires_at, status)
        (record or partial(add_file, self._store, limits=limits))(file)
        return file

    def delete(self, id: str, owner: str | None = None) -> None:
        """Delete a file.

        Args:
            owner: the owner to whom the file must belong; None for any owner.

        Raises:
            EntryNotFoundError: the owner has no file with this id.
            FileInUseError: an unfinished job or batch needs the file.
        """
        remove_unused_file(self._store, id, owner)
        self.path(id).unlink(missing_ok=True)
        self._delete_objects([id])

    def remove_expired(self) -> int:
        """Delete the expired files that no job or batch needs, and return the number of deleted files."""
        ids = remove_expired_files(self._store, datetime.now(UTC))
        for id in ids:
            self.path(id).unlink(missing_ok=True)
        self._delete_objects(ids)
        return len(ids)

    def remove_unknown(self) -> int:
        """Delete the contents of files that have no row in the store, and return the number of deleted files.

        Such contents remain after a crash, or if another server deleted the file.

        Contents that are being written or are less than an hour old are skipped. If none of the files has a row,
        nothing is deleted, because the contents probably belong to a different store than the server is using.
        """
        names = [path.name for path in self._folder.iterdir() if not path.name.startswith(_REMOVED)]
        known = known_files(self._store, names)
        unknown = [self._folder / name for name in names if name not in known] if known else []
        removed = [path.name for path in unknown if remove_left(path)]
        self._delete_objects(removed)
        return len(removed)

    def tidy_shared(self) -> None:
        """Delete the objects of files that no longer exist, and fetched copies that are no longer needed.

        Raises:
            ContentStoreError: the object store is not responding, or rejects the request.
        """
        if self._shared is None:
            return
        self._shared.remove_copies(self._store)
        marks = {path.name.removeprefix(_REMOVED): path for path in self._folder.glob(f"{_REMOVED}*")}
        known = known_files(self._store, list(marks))  # those that were written in a later attempt
        self._shared.delete([id for id in marks if id not in known])
        for path in marks.values():
            path.unlink(missing_ok=True)

    def share_missing(self) -> int:
        """Upload the file contents on this machine that the object store lacks, and return the number of uploaded
        files.

        Such files were added before an object store was configured, or come from a restored backup.

        Raises:
            ContentStoreError: the object store is not responding, or rejects the request.
        """
        if self._shared is None:
            return 0
        contents, shared, count = read_contents(self._store), self._shared.ids(), 0
        for content in contents:
            path = self.path(content.id)
            if content.id in shared or not path.is_file():
                continue
            try:
                self._shared.put(content, path)
            except (FileNotFoundError, IntegrityError) as error:
                log.error("could not upload the content of %s: %s", content.id, error)
                continue
            count += 1
            if not known_files(self._store, [content.id]):  # deleted meanwhile
                self._delete_objects([content.id])
        return count

    def _delete_objects(self, ids: Iterable[str]) -> None:
        """Mark objects for deletion. They are deleted in the background, so that clients never wait for the object
        store.
        """
        if self._shared is not None:
            for id in ids:
                (self._folder / f"{_REMOVED}{id}").touch(mode=0o600)
