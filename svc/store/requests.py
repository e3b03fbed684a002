"""Requests that ended, one row each, and how long they are kept. Knows nothing of HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, delete, func, insert, select
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.store.tables import RequestRow
from svc.version import Format, VersionId

_ROW_BYTES = 170
"""What a row without content takes, with its share of the indexes; measured."""
_KEPT_SHARE = 0.9  # of the size limit after a pruning, so that not each one has to sum up all rows
_DELETED_TOGETHER = 2_000  # rows in one transaction: no other writer waits long for it


class Dropped(StrEnum):
    """Why a row is not kept, or not all of it."""

    QUEUE_FULL = "queue_full"
    STORE_FAILED = "store_failed"
    CONTENT_LIMIT = "content_limit"
    """The row is kept, its prompt and answer are not: they are too long, or too many wait."""
    CONTENT_UNREADABLE = "content_unreadable"
    """As above: they are not text, and so cannot be redacted."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request that ended.

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
    """

    request_id: str
    started_at: datetime
    model: str
    version: VersionId | None
    format: Format | None
    route: str
    status: int
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

    @property
    def bytes(self) -> int:
        """Roughly what it takes in the store; its own id stands in an index too."""
        texts = (self.prompt, self.answer, self.client_request_id)
        content = sum(len(text.encode("utf-8")) for text in texts if text)
        return _ROW_BYTES + 2 * len(self.request_id) + content


_AS_THEY_ARE = [field.name for field in fields(RequestRecord) if field.name not in ("version", "format")]


def add_requests(store: Store, records: Sequence[RequestRecord]) -> None:
    """Writes a batch, all or nothing."""
    with store.begin() as connection:
        connection.execute(insert(RequestRow), [_columns(record) for record in records])


def _columns(record: RequestRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in _AS_THEY_ARE} | {
        "number": record.version.number if record.version else None,
        "format": record.format.value if record.format else None,
        "bytes": record.bytes,
    }


def prune_requests(store: Store, *, before: datetime, max_bytes: int) -> int:
    """Deletes rows by age, then the oldest ones by size; with each its feedback.

    Args:
        before: rows that started earlier go.
        max_bytes: of all rows together; past it, a tenth of it is made free.

    Returns:
        How many went.
    """
    gone = _delete(store, RequestRow.started_at < before)
    with Session(store) as session:
        if (session.scalar(select(func.sum(RequestRow.bytes))) or 0) <= max_bytes:
            return gone
        # By id, the order in which they ended: a clock may have been wrong.
        newer = func.sum(RequestRow.bytes).over(order_by=RequestRow.id.desc()).label("newer")
        ranked = select(RequestRow.id, newer).subquery()
        last = session.scalar(select(func.max(ranked.c.id)).where(ranked.c.newer > _KEPT_SHARE * max_bytes))
    return gone + (_delete(store, RequestRow.id <= last) if last is not None else 0)


def _delete(store: Store, which: ColumnElement[bool]) -> int:
    gone = 0
    while True:
        oldest = select(RequestRow.id).where(which).order_by(RequestRow.id).limit(_DELETED_TOGETHER)
        with store.begin() as connection:
            deleted = connection.execute(delete(RequestRow).where(RequestRow.id.in_(oldest))).rowcount
        gone += deleted
        if deleted < _DELETED_TOGETHER:
            break
    return gone
