"""Requests that ended, one row each, and how long they are kept. Knows nothing of HTTP."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, delete, func, select
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.store.tables import RequestRow
from svc.version import Format, VersionId

_ROW_BYTES = 170
"""What a row without content takes, with its share of the indexes; measured."""
_KEPT_SHARE = 0.9  # of the size limit after a pruning, so that not each one has to rank all rows
_DELETED_TOGETHER = 2_000  # rows in one transaction: no other writer waits long for it


class RequestOutcome(StrEnum):
    """How a request ended: a stream that broke has the status 200 and is no good answer."""

    COMPLETE = "complete"
    REFUSED = "refused"
    """Answered with an error, and not begun: the client's mistake, or no place for it now."""
    CLIENT_GONE = "client_gone"
    CLIENT_SLOW = "client_slow"
    """Cut off, because it took too little of its answer."""
    ENGINE_ERROR = "engine_error"
    SERVER_ERROR = "server_error"


class Dropped(StrEnum):
    """Why a row is not kept, or not all of it."""

    QUEUE_FULL = "queue_full"
    STORE_FAILED = "store_failed"
    CONTENT_LIMIT = "content_limit"
    """The row is kept, its prompt and answer are not: they are too long, or too many wait."""
    CONTENT_UNREADABLE = "content_unreadable"
    """As above: they are not text, and so cannot be redacted."""
    CONTENT_UNREDACTED = "content_unredacted"
    """As above, or feedback without its correction and label: an own pattern took too long on them."""
    FEATURES = "features"
    """The row is stored, its features for drift are not: its text cannot be read or is too long, or too many wait."""


class RequestRecord(NamedTuple):
    """One request that ended. A tuple, since one is made for each request, on the event loop.

    Attributes:
        request_id: the server's own.
        client_request_id: what the client called it, if anything.
        model: the served name, or `unknown`.
        version: what answered; None where none did.
        key_id: of the caller's key; None for a server without keys.
        status: HTTP status as sent, 499 when the client left first.
        reason: error code; None for a good answer.
        finish_reason: the engine's, of the first choice.
        seconds: from the request's last byte to the answer's last.
        first_token_seconds: to the first streamed token.
        prompt: only where content is kept: JSON of the messages, or the prompt; redacted.
        answer: only where content is kept: text of the first choice; redacted.
        temperature: as the client sent it; None where it did not, or sent no number.
        max_tokens: the longest answer that the client asked for, likewise.
        outcome: how it ended.
        user_hash: `hash_user` of what the client called its user, if anything.
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

    @property
    def bytes(self) -> int:
        """Roughly what it takes in the store; its own id stands in an index too."""
        texts = (self.prompt, self.answer, self.client_request_id, self.user_hash)
        content = sum(len(text.encode("utf-8")) for text in texts if text)
        return _ROW_BYTES + 2 * len(self.request_id) + content


def hash_user(user: str) -> str:
    """What is kept of a client's own name for a user, often a mail address: enough to find what is to be forgotten."""
    return hashlib.sha256(user.encode("utf-8", "surrogatepass")).hexdigest()[:32]


_AT_ONCE = 100
"""Rows of one statement, which keeps the interpreter for a millisecond or two: no answer notices."""


def add_requests(store: Store, records: Sequence[RequestRecord]) -> None:
    """Writes a batch, all or nothing.

    By the driver: to have SQLAlchemy look at every value of every row takes longer than all that the database does.
    """
    with store.begin() as connection:
        for start in range(0, len(records), _AT_ONCE):
            connection.exec_driver_sql(_INSERT, [_row(each) for each in records[start : start + _AT_ONCE]])


_COLUMNS = [*("number" if name == "version" else name for name in RequestRecord._fields), "bytes"]
_VALUES = ", ".join("?" for name in _COLUMNS)
_INSERT = f"INSERT INTO requests ({', '.join(_COLUMNS)}) VALUES ({_VALUES})"  # noqa: S608 - our own names


def _row(record: RequestRecord) -> tuple[Any, ...]:
    """A record's values, as SQLite has them, in the order of `_COLUMNS`."""
    # Enums as plain texts: the driver asks their class at length whether they are something else.
    stored: dict[str, Any] = {
        "started_at": record.started_at.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds"),
        "version": record.version.number if record.version else None,
        "format": str(record.format) if record.format else None,
        "outcome": str(record.outcome),
    }
    return (*record._replace(**stored), record.bytes)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a pruning did.

    Attributes:
        rows: that went.
        left_bytes: what those that stay take together.
    """

    rows: int
    left_bytes: int


def newest_request_at(store: Store) -> datetime | None:
    """Return when the request that was stored last began; None where there is none.

    By id, the order in which they ended: a clock may have been wrong.
    """
    with Session(store) as session:
        return session.scalar(select(RequestRow.started_at).order_by(RequestRow.id.desc()).limit(1))


def prune_requests(store: Store, *, before: datetime | None, max_bytes: int, known_bytes: int | None = None) -> Pruned:
    """Deletes rows by age, then the oldest ones by size; with each its feedback.

    Args:
        before: rows that started earlier go; None: none goes by its age.
        max_bytes: of all rows together; past it, a tenth of it is made free.
        known_bytes: what all rows take together or more, as who writes them reckons: within the limit they are not
            summed up, for which all of them are read. None where nobody knows.
    """
    gone, gone_bytes = 0, 0
    if before is not None:
        with store.connect() as connection:
            gone, gone_bytes = delete_requests(connection, RequestRow.started_at < before)
    left = None if known_bytes is None else max(0, known_bytes - gone_bytes)
    if left is not None and left <= max_bytes:
        return Pruned(gone, left)
    with Session(store) as session:
        left = int(session.scalar(select(func.sum(RequestRow.bytes))) or 0)
        if left <= max_bytes:
            return Pruned(gone, left)
        # By id, the order in which they ended: a clock may have been wrong.
        newer = func.sum(RequestRow.bytes).over(order_by=RequestRow.id.desc()).label("newer")
        ranked = select(RequestRow.id, newer).subquery()
        last = session.scalar(select(func.max(ranked.c.id)).where(ranked.c.newer > _KEPT_SHARE * max_bytes))
    with store.connect() as connection:
        oldest, oldest_bytes = delete_requests(connection, RequestRow.id <= last)
    return Pruned(gone + oldest, left - oldest_bytes)


def delete_requests(connection: Connection, which: ColumnElement[bool]) -> tuple[int, int]:
    """Delete rows with their feedback, the oldest first, some in each transaction of the connection.

    Returns:
        How many rows went, and the bytes that they took.
    """
    rows, size = 0, 0
    while True:
        oldest = select(RequestRow.id).where(which).order_by(RequestRow.id).limit(_DELETED_TOGETHER)
        with connection.begin():
            statement = delete(RequestRow).where(RequestRow.id.in_(oldest)).returning(RequestRow.bytes)
            deleted = connection.scalars(statement).all()
        rows, size = rows + len(deleted), size + sum(deleted)
        if len(deleted) < _DELETED_TOGETHER:
            return rows, size
