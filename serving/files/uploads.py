"""Files that clients upload in parts. Until an upload is complete, each part is a file in the upload's folder.

The paths are made from ids, never from anything that a client sent.
"""

import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Engine as Store

from serving.files.client_files import ClientFiles
from serving.files.file_writer import FileWriter, remove_left, writing_file
from serving.files.rows import ClientFile, StorageLimits
from serving.files.upload_rows import (
    Upload,
    UploadPart,
    UploadStatus,
    add_part,
    cancel_upload,
    complete_upload,
    expire_uploads,
    pending_uploads,
    read_parts,
    require_pending,
)
from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import SvcError

_BLOCK = 2**20


@answered_with(400, ErrorCode.INVALID_REQUEST)
class ChecksumError(SvcError):
    """Raised when an uploaded file does not have the expected checksum. Clients see the message."""


class ClientUploads:
    """Receives files that clients upload in parts.

    Args:
        folder: folder for the parts, which is created if it does not exist.
        files: clients' files, to which complete uploads are added.
    """

    def __init__(self, store: Store, folder: Path, files: ClientFiles) -> None:
        self._store = store
        self._folder = folder
        self._files = files
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def writing_part(self, upload: Upload) -> Iterator[tuple[str, FileWriter]]:
        """Yield the id of a new part of an upload, and a writer for the part. If an error occurs, the partial file is
        deleted.
        """
        id, folder = f"part_{secrets.token_hex(12)}", self._folder / upload.id
        folder.mkdir(mode=0o700, exist_ok=True)
        with writing_file(folder / id) as writer:
            yield id, writer

    def add_part(self, upload: Upload, id: str, writer: FileWriter) -> UploadPart:
        """Add the part that a writer has written. This must be the last call within `writing_part`.

        Raises:
            EntryNotFoundError, UploadEndedError: the upload does not exist, or has ended.
            UploadSizeError: the parts together exceed the upload's declared size, or there are too many parts.
        """
        writer.close()
        part = UploadPart(id, upload.id, writer.bytes, datetime.now(UTC))
        add_part(self._store, part)
        return part

    def complete(
        self,
        upload: Upload,
        part_ids: Sequence[str],
        *,
        md5: str | None,
        limits: StorageLimits,
        on_write: Callable[[int], None],
    ) -> tuple[Upload, ClientFile]:
        """Combine an upload's parts into a file, in the given order, and return the upload and the file.

        Args:
            md5: checksum that the file must have, in hexadecimal, or None.
            limits: limits for all files of the owner.
            on_write: called with the size of each block before it is written.

        Raises:
            EntryNotFoundError, UploadEndedError, UploadSizeError: the upload has ended, or does not have these parts.
            ChecksumError: the file has a different checksum. The upload stays open.
            ContentStoreError: the object store is not responding, or rejects the request. The upload stays open.
            StorageLimitError: the file exceeds a limit.
        """
        require_pending(upload)
        parts = read_parts(self._store, upload, part_ids)
        checksum = hashlib.md5(usedforsecurity=False)
        with self._files.writing() as (id, writer):
            for block in self._blocks(parts):
                on_write(len(block))
                writer.write(block)
                if md5 is not None:
                    checksum.update(block)
            if md5 is not None and checksum.hexdigest() != md5.lower():
                raise ChecksumError(f"the content has the MD5 checksum {checksum.hexdigest()}", expected=md5)
            file = self._files.add(
                id,
                writer,
                owner=upload.owner,
                purpose=upload.purpose,
                filename=upload.filename,
                expires_after_s=upload.expires_after_s,
                record=lambda file: complete_upload(self._store, upload.id, file, limits),
            )
        self.remove_parts(upload.id)
        return replace(upload, status=UploadStatus.COMPLETED, file=file.id), file

    def cancel(self, id: str, owner: str | None) -> Upload:
        """Cancel an upload and return it. See `serving.files.upload_rows.cancel_upload`."""
        upload = cancel_upload(self._store, id, owner)
        self.remove_parts(id)
        return upload

    def remove_parts(self, id: str) -> None:
        """Delete the parts of an upload that has ended."""
        shutil.rmtree(self._folder / id, ignore_errors=True)

    def remove_expired(self) -> int:
        """End the uploads that have expired, delete their parts, and return the number of expired uploads."""
        ids = expire_uploads(self._store, datetime.now(UTC))
        for id in ids:
            self.remove_parts(id)
        return len(ids)

    def remove_unknown(self) -> int:
        """Delete the parts of uploads that have ended or are unknown, and return the number of deleted parts.

        Such parts can be left behind by a crash. Parts that are being written or are less than an hour old are skipped.
        """
        folders = list(self._folder.iterdir())  # first: an upload that begins later is not in them
        pending = pending_uploads(self._store)
        removed = 0
        for folder in folders:
            if folder.name not in pending:
                removed += sum(remove_left(path) for path in folder.iterdir())
                with suppress(OSError):  # a part is still being written
                    folder.rmdir()
        return removed

    def _blocks(self, parts: Sequence[UploadPart]) -> Iterator[bytes]:
        for part in parts:
            with (self._folder / part.upload / part.id).open("rb") as file:
                while block := file.read(_BLOCK):
                    yield block
