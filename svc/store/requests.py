"""The request log, which has one row per finished request, and its retention. This module does not depend
on HTTP.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, delete, func, select
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.store.database import is_sqlite, take_write_lock, write_transaction
from svc.store.tables import RequestRow, storable_text
from svc.version import Format, VersionId

_ROW_BYTES = 170
"""Measured size of a row without content, including its index entries, in bytes."""
_KEPT_SHARE = 0.9  # of the size limit after a pruning, so that not every pruning has to rank all rows
_DELETED_TOGETHER = 2_000  # rows in one transaction: no other writer waits long for it


class RequestOutcome(StrEnum):
    """Outcome of a request. A broken stream has HTTP status 200 but counts as failed."""

    COMPLETE = "complete"
    REFUSED = "refused"
    """The request was rejected with an error before it started, because it was invalid or no capacity was free."""
    CLIENT_GONE = "client_gone"
    CLIENT_SLOW = "client_slow"
    """The request was cut off because the client read the response too slowly."""
    ENGINE_ERROR = "engine_error"
    SERVER_ERROR = "server_error"


class Dropped(StrEnum):
    """Reason why a request's row, or part of it, was not stored."""

    QUEUE_FULL = "queue_full"
    STORE_FAILED = "store_failed"
    CONTENT_LIMIT = "content_limit"
    """The request's row is stored without prompt and answer, because they are too long, or because too many
    prompts and answers are already waiting to be stored."""
    CONTENT_UNREADABLE = "content_unreadable"
    """The request's row is stored without prompt and answer, because they are not valid text and so cannot be
    redacted."""
    CONTENT_UNREDACTED = "content_unredacted"
    """The request's row is stored without prompt and answer, or its feedback is stored without texts, because a custom
    redaction pattern took too long."""
    FEATURES = "features"
    """The request's row is stored without drift features, because the text is unreadable or too long, or too
    many rows are waiting."""


class RequestRecord(NamedTuple):
    """Log record of one finished request. It is a tuple for speed, because the event loop creates a record for each
    request.

    Attributes:
        request_id: the server's id for the request.
        client_request_id: the client's id for the request, if any.
        model: served name of the model, or `unknown`.
        version: version that answered; None if no version answered.
        key_id: id of the caller's key; None for a server without keys.
        status: HTTP status that was sent; 499 if the client disconnected first.
        reason: error code; None for a successful answer.
        finish_reason: the engine's finish reason for the first choice.
        seconds: time from the request's last byte to the answer's last byte.
        first_token_seconds: time from the request's last byte to the first streamed token.
        prompt: JSON of the messages, or the prompt, redacted; None if content is not stored.
        answer: text of the first choice, redacted; None if content is not stored.
        temperature: sampling temperature as sent by the client; None if it was missing or not a number.
        max_tokens: the client's limit on the answer's length in tokens; None if it was missing or not a number.
        user_hash: `hash_user` of the user's name as sent by the client, if any.
        unit: hash of the user, conversation or request that a rollout assigned to the version; None if there was no
            rollout.
        valid: whether the answer is JSON; None if the model is not expected to answer in JSON, or if there was no
            rollout.
    """

    request_id: str
    started_at: datetime
    model: str
    version: VersionId | None
    format: Format | None
    route: str
    status: int
    outcome: RequestOutcome
    seconds: float
    key_id: str | None = None
    reason: str | None = None
    finish_reason: str | None = None
    first_token_seconds: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    prompt: str | None = None
    answer: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    client_request_id: str | None = None
    user_hash: str | None = None
    unit: str | None = None
    valid: bool | None = None

    @property
    def bytes(self) -> int:
        """Approximate size of the row in the store, including the request id's index entry."""
        texts = (self.prompt, self.answer, self.client_request_id, self.user_hash, self.unit)
        content = sum(len(text.encode("utf-8", "replace")) for text in texts if text)
        return _ROW_BYTES + 2 * len(self.request_id) + content


def hash_user(user: str) -> str:
    """Hash a user's name, which is often an email address. Requests are stored with this hash
    instead of the name, so that a user's requests can still be found and deleted.
    """
    return hashlib.sha256(user.encode("utf-8", "surrogatepass")).hexdigest()[:32]


_BATCH_ROWS = 100
"""Number of rows per SQL statement. A statement of this size blocks the interpreter for one or two ms,
which is too short to delay answers."""


def add_requests(store: Store, records: Sequence[RequestRecord]) -> None:
    """Write a batch of request records atomically.

    This uses the database driver directly, because SQLAlchemy's processing of each value takes longer than
    the database's work.
    """
    mark = "?" if is_sqlite(store) else "%s"
    insert = f"INSERT INTO requests ({', '.join(_COLUMNS)}) VALUES ({', '.join(mark for _ in _COLUMNS)})"  # noqa: S608 - our own names
    row = _sqlite_row if is_sqlite(store) else _postgresql_row
    with write_transaction(store) as connection:
        for start in range(0, len(records), _BATCH_ROWS):
            connection.exec_driver_sql(insert, [row(record) for record in records[start : start + _BATCH_ROWS]])


_FOREIGN_TEXTS = ("prompt", "answer", "finish_reason", "client_request_id")
_COLUMNS = [*("number" if name == "version" else name for name in RequestRecord._fields), "bytes"]


def _sqlite_row(record: RequestRecord) -> tuple[Any, ...]:
    """Return a record's values as stored by SQLite, in the order of `_COLUMNS`."""
    return _row(record, record.started_at.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds"))


def _postgresql_row(record: RequestRecord) -> tuple[Any, ...]:
    """Return a record's values as stored by PostgreSQL, in the order of `_COLUMNS`."""
    return _row(record, record.started_at)


def _row(record: RequestRecord, started_at: str | datetime) -> tuple[Any, ...]:
    """Return a record's values in the order of `_COLUMNS`."""
    # Enums as plain texts: the driver's adaptation of other classes is slow.
    stored: dict[str, Any] = {
        "started_at": started_at,
        "version": record.version.number if record.version else None,
        "format": str(record.format) if record.format else None,
        "outcome": str(record.outcome),
    }
    # If a text from a client or an engine cannot be stored, the other requests' rows must still be stored.
    for name in _FOREIGN_TEXTS:
        if text := getattr(record, name):
            stored[name] = storable_text(text)
    return (*record._replace(**stored), record.bytes)


@dataclass(frozen=True, slots=True)
class Pruned:
    """Result of deleting old rows.

    Attributes:
        rows: number of rows deleted.
        left_bytes: total size of the remaining rows, in bytes.
    """

    rows: int
    left_bytes: int


def newest_request_at(store: Store) -> datetime | None:
    """Return the start time of the most recently stored request, or None if there are no requests.

    Requests are ordered by id, because a clock may have been wrong.
    """
    with Session(store) as session:
        return session.scalar(select(RequestRow.started_at).order_by(RequestRow.id.desc()).limit(1))


def prune_requests(store: Store, *, before: datetime | None, max_bytes: int, known_bytes: int | None = None) -> Pruned:
    """Delete rows that are too old, and then the oldest remaining rows until the size limit is met.

    Feedback on deleted rows is deleted too.

    Args:
        before: delete requests that started earlier; None disables deletion by age.
        max_bytes: maximum total size of all rows; if exceeded, rows are deleted until the total is 90% of this maximum.
        known_bytes: upper bound on the total size of all rows, tracked by their writer. If it is within the
            limit, the sum over all rows is not computed. None if unknown.
    """
    deleted, deleted_bytes = 0, 0
    if before is not None:
        with store.connect() as connection:
            deleted, deleted_bytes = delete_requests(connection, RequestRow.started_at < before)
    size = None if known_bytes is None else max(0, known_bytes - deleted_bytes)
    if size is not None and size <= max_bytes:
        return Pruned(deleted, size)
    with Session(store) as session:
        size = int(session.scalar(select(func.sum(RequestRow.bytes))) or 0)
        if size <= max_bytes:
            return Pruned(deleted, size)
        # By id, the order in which they ended, because a clock may have been wrong.
        newer = func.sum(RequestRow.bytes).over(order_by=RequestRow.id.desc()).label("newer")
        ranked = select(RequestRow.id, newer).subquery()
        last = session.scalar(select(func.max(ranked.c.id)).where(ranked.c.newer > _KEPT_SHARE * max_bytes))
    with store.connect() as connection:
        oldest, oldest_bytes = delete_requests(connection, RequestRow.id <= last)
    return Pruned(deleted + oldest, size - oldest_bytes)


def delete_requests(connection: Connection, which: ColumnElement[bool]) -> tuple[int, int]:
    """Delete the rows that match a condition, and their feedback. Rows are deleted oldest first, in several
    transactions.

    Returns:
        The number of rows deleted, and their size in bytes.
    """
    rows, size = 0, 0
    while True:
        oldest = select(RequestRow.id).where(which).order_by(RequestRow.id).limit(_DELETED_TOGETHER)
        with connection.begin():
            take_write_lock(connection)
            statement = delete(RequestRow).where(RequestRow.id.in_(oldest)).returning(RequestRow.bytes)
            deleted = connection.scalars(statement).all()
        rows, size = rows + len(deleted), size + sum(deleted)
        if len(deleted) < _DELETED_TOGETHER:
            return rows, size
