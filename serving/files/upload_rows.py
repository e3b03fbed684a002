"""Uploads of files in parts, with one row per upload.

The parts are stored outside the database, see serving.files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from serving.files.rows import ClientFile, Purpose, StorageLimitError, StorageLimits, insert_file
from serving.http.page import EntryNotFoundError, find_row, require_fewer
from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import RefusedError
from svc.store.database import exclusive
from svc.store.tables import UploadPartRow, UploadRow

MAX_OPEN = 100
"""Maximum number of unfinished uploads per key."""
MAX_PARTS = 10_000
"""Maximum number of parts per upload."""
_KEPT = timedelta(days=1)
"""How long an upload's row is kept after the upload's expiry time."""


class UploadStatus(StrEnum):
    """State of an upload, in OpenAI's terms."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@answered_with(400, ErrorCode.UPLOAD_ENDED)
class UploadEndedError(RefusedError):
    """Raised on an attempt to change an upload that has ended. Clients see the message."""


@answered_with(400, ErrorCode.INVALID_REQUEST)
class UploadSizeError(RefusedError):
    """Raised when an upload's parts do not add up to its size, or when there are too many parts. Clients see the
    message.
    """


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload in parts.

    Attributes:
        owner: id of the key that owns the upload; empty for requests without a key.
        filename: the client's name for the file, never used as a path.
        bytes: size of the file.
        expires_after_s: lifetime of the completed file in seconds, or None if it does not expire.
        file: id of the file, once the upload is complete.
    """

    id: str
    owner: str
    purpose: Purpose
    filename: str
    bytes: int
    created_at: datetime
    expires_at: datetime
    expires_after_s: int | None = None
    status: UploadStatus = UploadStatus.PENDING
    file: str | None = None


@dataclass(frozen=True, slots=True)
class UploadPart:
    """A part of an upload."""

    id: str
    upload: str
    bytes: int
    created_at: datetime


def add_upload(store: Store, upload: Upload) -> None:
    """Record a new upload, which has no parts yet.

    Raises:
        StorageLimitError: the owner has too many unfinished uploads.
    """
    with exclusive(store) as session:
        is_open = (UploadRow.status == UploadStatus.PENDING.value) & (UploadRow.expires_at > datetime.now(UTC))
        todo = "complete or cancel uploads, or wait until they expire, an hour after their creation"
        require_fewer(session, UploadRow, upload.owner, is_open, MAX_OPEN, StorageLimitError, noun="uploads", todo=todo)
        session.add(UploadRow.of(upload))


def find_upload(store: Store, id: str, owner: str | None) -> Upload:
    """Return the upload with the given id.

    Args:
        owner: the owner whose uploads are searched; None for all owners.

    Raises:
        EntryNotFoundError: the owner has no upload with this id.
    """
    with Session(store) as session:
        return find_row(session, UploadRow, id, owner, "upload").read(Upload)


def require_pending(upload: Upload) -> None:
    """Check that an upload can be changed.

    Raises:
        UploadEndedError: the upload has ended.
    """
    expired = upload.status is UploadStatus.PENDING and upload.expires_at <= datetime.now(UTC)
    if expired or upload.status is not UploadStatus.PENDING:
        status = UploadStatus.EXPIRED if expired else upload.status
        raise UploadEndedError(f"upload {upload.id} is {status}", todo="create another upload")


def add_part(store: Store, part: UploadPart) -> None:
    """Add a part that has been stored.

    Raises:
        EntryNotFoundError, UploadEndedError: the upload does not exist, or has ended.
        UploadSizeError: the parts together exceed the upload's declared size, or there are too many parts.
    """
    with exclusive(store) as session:
        upload = _require_pending(session, part.upload)
        query = select(func.count(), func.coalesce(func.sum(UploadPartRow.bytes), 0))
        count, size = session.execute(query.where(UploadPartRow.upload == part.upload)).one()
        if count >= MAX_PARTS:
            raise UploadSizeError(f"the upload already has {count} parts", expected=f"at most {MAX_PARTS}")
        if size + part.bytes > upload.bytes:
            wrong = f"the parts total {size + part.bytes} bytes"
            raise UploadSizeError(
                wrong, expected=f"at most {upload.bytes} bytes, the size given when the upload was created"
            )
        session.add(UploadPartRow.of(part))


def read_parts(store: Store, upload: Upload, ids: Sequence[str]) -> list[UploadPart]:
    """Return parts of an upload, in the given order.

    Raises:
        EntryNotFoundError: the upload lacks one of the parts.
        UploadSizeError: the parts do not add up to the upload's size.
    """
    with Session(store) as session:
        rows = session.scalars(select(UploadPartRow).where(UploadPartRow.upload == upload.id))
        parts = {row.id: row.read(UploadPart) for row in rows}
    if missing := next((id for id in ids if id not in parts), None):
        raise EntryNotFoundError(
            f"upload {upload.id} has no part {missing[:100]!a}",
            expected="ids of parts that belong to this upload",
            param="part_ids",
        )
    if len(set(ids)) < len(ids):
        raise UploadSizeError("a part is listed twice", expected="each part once, in file order")
    if (size := sum(parts[id].bytes for id in ids)) != upload.bytes:
        raise UploadSizeError(
            f"the parts total {size} bytes",
            expected=f"{upload.bytes} bytes, the size given when the upload was created",
        )
    return [parts[id] for id in ids]


def complete_upload(store: Store, id: str, file: ClientFile, limits: StorageLimits) -> None:
    """Add an upload's file, and remove the rows of its parts.

    Raises:
        EntryNotFoundError, UploadEndedError: the upload does not exist, or has ended.
        StorageLimitError: the file exceeds a limit.
    """
    with exclusive(store) as session:
        row = _require_pending(session, id)
        _remove_parts(session, [id])
        insert_file(session, file, limits)
        row.status, row.file = UploadStatus.COMPLETED.value, file.id


def cancel_upload(store: Store, id: str, owner: str | None) -> Upload:
    """Cancel an upload, remove the rows of its parts, and return it. Cancelling it again has no effect.

    Args:
        owner: the owner whose uploads are searched; None for all owners.

    Raises:
        EntryNotFoundError: the owner has no upload with this id.
        UploadEndedError: the upload has already been completed, or has expired.
    """
    with exclusive(store) as session:
        row = find_row(session, UploadRow, id, owner, "upload")
        if row.status != UploadStatus.CANCELLED.value:
            require_pending(row.read(Upload))
            _remove_parts(session, [id])
            row.status = UploadStatus.CANCELLED.value
            session.flush()
        return row.read(Upload)


def expire_uploads(store: Store, now: datetime) -> list[str]:
    """End the uploads that have expired, and remove the rows of their parts. Rows of ended uploads are removed a day
    after their expiry time.

    Returns:
        The ids of the uploads that were ended, at most 1,000 per call.
    """
    pending = UploadRow.status == UploadStatus.PENDING.value
    with exclusive(store) as session:
        session.execute(delete(UploadRow).where(~pending, UploadRow.expires_at <= now - _KEPT))
        ids = list(session.scalars(select(UploadRow.id).where(pending, UploadRow.expires_at <= now).limit(1000)))
        _remove_parts(session, ids)
        session.execute(update(UploadRow).where(UploadRow.id.in_(ids)).values(status=UploadStatus.EXPIRED.value))
    return ids


def pending_uploads(store: Store) -> set[str]:
    """Return the ids of the uploads that have not ended."""
    with Session(store) as session:
        return set(session.scalars(select(UploadRow.id).where(UploadRow.status == UploadStatus.PENDING.value)))


def _require_pending(session: Session, id: str) -> UploadRow:
    row = find_row(session, UploadRow, id, None, "upload")
    require_pending(row.read(Upload))
    return row


def _remove_parts(session: Session, uploads: Sequence[str]) -> None:
    session.execute(delete(UploadPartRow).where(UploadPartRow.upload.in_(uploads)))
