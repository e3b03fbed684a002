"""Clients' files, with one row per file: uploads, and results that the server wrote for clients.

The contents are stored outside the database, see serving.files.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import ColumnElement, delete, func, or_, select, true, update
from sqlalchemy import Engine as Store
from sqlalchemy.orm import InstrumentedAttribute, Session

from serving.http.page import Page, find_row, owned_by, read_page
from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import RefusedError, SvcError
from svc.store.database import exclusive
from svc.store.statuses import BatchStatus, JobStatus
from svc.store.tables import BatchRow, FileRow, JobRow, UploadPartRow, UploadRow

_OPEN_JOBS = [status.value for status in JobStatus if not status.ended]
_CHUNK = 500
_OPEN_BATCHES = [status.value for status in BatchStatus if not status.ended]


@answered_with(400, ErrorCode.STORAGE_LIMIT)
class StorageLimitError(SvcError):
    """Raised when a key's files would exceed its limits. Clients see the message."""


@answered_with(409, ErrorCode.FILE_IN_USE)
class FileInUseError(RefusedError):
    """Raised on an attempt to delete a file that a job or batch still needs. Clients see the message."""


class Purpose(StrEnum):
    """Purpose of a file, in OpenAI's terms."""

    FINE_TUNE = "fine-tune"
    FINE_TUNE_RESULTS = "fine-tune-results"
    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"


UPLOAD_PURPOSES = (Purpose.FINE_TUNE, Purpose.BATCH)
"""Purposes of files that clients upload. Files with other purposes are written by the server."""


class FileStatus(StrEnum):
    """Validation status of a file: not checked yet, usable, or unusable."""

    UPLOADED = "uploaded"
    PROCESSED = "processed"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class ClientFile:
    """A client's file.

    Attributes:
        owner: id of the key that owns the file; empty for requests without a key.
        filename: the client's name for the file, never used as a path.
        sha256: hash of the contents, in hexadecimal.
        status_details: why the file is unusable, with line numbers.
    """

    id: str
    owner: str
    purpose: Purpose
    filename: str
    bytes: int
    sha256: str
    created_at: datetime
    expires_at: datetime | None = None
    status: FileStatus = FileStatus.UPLOADED
    status_details: str | None = None


@dataclass(frozen=True, slots=True)
class StorageLimits:
    """Limits on the files that one key may store.

    Attributes:
        bytes: maximum total size of all files and of the parts of uploads.
        files: maximum number of files.
    """

    bytes: int
    files: int


def add_file(store: Store, file: ClientFile, limits: StorageLimits | None = None) -> None:
    """Add a file whose contents have been stored.

    Args:
        limits: limits on all of the owner's files, or None for no limits.

    Raises:
        StorageLimitError: the file exceeds a limit.
    """
    with exclusive(store) as session:
        insert_file(session, file, limits)


def insert_file(session: Session, file: ClientFile, limits: StorageLimits | None) -> None:
    """Add a file within a transaction of svc.store. See `add_file`."""
    if limits is not None:
        _require_storage(session, file.owner, file.bytes, limits)
    session.add(FileRow.of(file))


def require_storage(store: Store, owner: str, more: int, limits: StorageLimits) -> int:
    """Return the number of bytes that an owner may still store.

    Args:
        more: size in bytes of an additional file, which must fit.

    Raises:
        StorageLimitError: an additional file of this size would exceed a limit.
    """
    with Session(store) as session:
        return _require_storage(session, owner, more, limits)


def find_file(store: Store, id: str, owner: str | None) -> ClientFile:
    """Return the file with the given id.

    Args:
        owner: the owner whose files are searched; None for all owners.

    Raises:
        EntryNotFoundError: the owner has no file with this id.
    """
    with Session(store) as session:
        return find_row(session, FileRow, id, owner, "file").read(ClientFile)


def read_files(
    store: Store, owner: str | None, purposes: Collection[Purpose] = tuple(Purpose), *, page: Page
) -> tuple[list[ClientFile], bool]:
    """Return one page of an owner's files, and whether another page follows.

    Args:
        owner: id of the owner, or None for the files of all owners.

    Raises:
        EntryNotFoundError: the file after which the page starts is not in the list.
    """
    return read_page(store, FileRow, ClientFile, owned_by(FileRow, owner) & FileRow.purpose.in_(purposes), page)


def read_unchecked(store: Store, most: int = 1000) -> list[ClientFile]:
    """Return up to `most` of the oldest uploaded files that have not been checked yet."""
    query = select(FileRow).where(FileRow.status == FileStatus.UPLOADED.value, FileRow.purpose.in_(UPLOAD_PURPOSES))
    with Session(store) as session:
        rows = session.scalars(query.order_by(FileRow.created_at, FileRow.id).limit(most))
        return [row.read(ClientFile) for row in rows]


def set_file_status(store: Store, id: str, status: FileStatus, details: str | None = None) -> None:
    """Record the result of checking a file, unless the file has been deleted."""
    with store.begin() as connection:
        connection.execute(update(FileRow).where(FileRow.id == id), {"status": status.value, "status_details": details})


def remove_file(store: Store, id: str) -> None:
    """Delete a file's row, if there is one."""
    with store.begin() as connection:
        connection.execute(delete(FileRow).where(FileRow.id == id))


def remove_unused_file(store: Store, id: str, owner: str | None) -> None:
    """Delete a file's row, unless an unfinished job or batch needs the file.

    Args:
        owner: the owner whose files are searched; None for all owners.

    Raises:
        EntryNotFoundError: the owner has no file with this id.
        FileInUseError: an unfinished job or batch needs the file.
    """
    with exclusive(store) as session:
        row = find_row(session, FileRow, id, owner, "file")
        for noun, table, uses in (("job", JobRow, _used_by_job(id)), ("batch", BatchRow, _used_by_batch(id))):
            if user := session.scalar(select(table.id).where(uses).limit(1)):
                raise FileInUseError(
                    f"file {id} is used by the unfinished {noun} {user}",
                    todo=f"cancel the {noun}, or delete the file when the {noun} has ended",
                )
        session.delete(row)


def remove_expired_files(store: Store, now: datetime) -> list[str]:
    """Delete the rows of expired files, except those that an unfinished job or batch needs.

    Returns:
        The ids of the deleted files, at most 1,000 per call.
    """
    query = select(FileRow.id).where(FileRow.expires_at <= now, ~_is_needed()).limit(1000)
    with exclusive(store) as session:
        ids = list(session.scalars(query))
        session.execute(delete(FileRow).where(FileRow.id.in_(ids)))
    return ids


@dataclass(frozen=True, slots=True)
class FileContent:
    """Size and SHA-256 of a client's file."""

    id: str
    bytes: int
    sha256: str


def read_contents(store: Store) -> list[FileContent]:
    """Return the sizes and hashes of all clients' files."""
    with Session(store) as session:
        rows = session.execute(select(FileRow.id, FileRow.bytes, FileRow.sha256).order_by(FileRow.id))
        return [FileContent(id, size, sha256) for id, size, sha256 in rows]


def find_content(store: Store, id: str) -> FileContent:
    """Return the size and hash of a client's file.

    Raises:
        EntryNotFoundError: there is no file with this id.
    """
    file = find_file(store, id, None)
    return FileContent(file.id, file.bytes, file.sha256)


def known_files(store: Store, ids: Sequence[str]) -> set[str]:
    """Return the given ids that belong to existing files."""
    return _matching_files(store, ids, true())


def needed_files(store: Store, ids: Sequence[str]) -> set[str]:
    """Return the given ids that belong to files needed by unfinished jobs or batches."""
    return _matching_files(store, ids, _is_needed())


def _matching_files(store: Store, ids: Sequence[str], condition: ColumnElement[bool]) -> set[str]:
    query = select(FileRow.id).where(condition)
    with Session(store) as session:
        chunks = [ids[start : start + _CHUNK] for start in range(0, len(ids), _CHUNK)]
        return {id for chunk in chunks for id in session.scalars(query.where(FileRow.id.in_(chunk)))}


def _is_needed() -> ColumnElement[bool]:
    by_job = select(JobRow.id).where(_used_by_job(FileRow.id)).exists()
    return by_job | select(BatchRow.id).where(_used_by_batch(FileRow.id)).exists()


def _used_by_job(id: str | InstrumentedAttribute[str]) -> ColumnElement[bool]:
    return JobRow.status.in_(_OPEN_JOBS) & or_(JobRow.training_file == id, JobRow.validation_file == id)


def _used_by_batch(id: str | InstrumentedAttribute[str]) -> ColumnElement[bool]:
    return BatchRow.status.in_(_OPEN_BATCHES) & (BatchRow.input_file == id)


def _require_storage(session: Session, owner: str, more: int, limits: StorageLimits) -> int:
    query = select(func.count(), func.coalesce(func.sum(FileRow.bytes), 0)).where(FileRow.owner == owner)
    files, size = session.execute(query).one()
    parts = select(func.coalesce(func.sum(UploadPartRow.bytes), 0)).join(
        UploadRow, UploadRow.id == UploadPartRow.upload
    )
    size += session.scalars(parts.where(UploadRow.owner == owner)).one()
    if files >= limits.files:
        raise StorageLimitError(
            f"this key has {files} files",
            expected=f"fewer than {limits.files}",
            todo="delete files, or let them expire",
        )
    if size + more > limits.bytes:
        raise StorageLimitError(
            f"this key has {size} bytes of files, so {more} more bytes would exceed its limit",
            expected=f"at most {limits.bytes} bytes in total",
            todo="delete files, or let them expire",
        )
    return limits.bytes - int(size)
