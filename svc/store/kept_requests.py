"""Finds requests that can be replayed unchanged from their stored prompt and answer."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Engine as Store
from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from svc.store.answered import answered_by
from svc.store.requests import RequestOutcome, RequestRecord
from svc.store.tables import RequestRow
from svc.version import Format, Target, VersionId

CALL = '{"name": "%", "arguments": %}'
"""SQL pattern that matches a tool call in a stored answer. `answer_text` writes calls in this form, which differs from
the text that the model generated."""
_NOT_TEXT = ('"type": "image', '"type": "input_', '"type": "video', '"type": "audio', '"type": "file"')
_TOOLS = ('"tool_calls": ', '"tool_call_id": ', '"role": "tool"')
"""Substrings that occur in the stored JSON of messages only if the messages contain content other than text, or use
tools. They cannot occur in the text of a message, because quotes in it are escaped."""


def find_kept_requests(
    store: Store,
    target: Target,
    *,
    route: str,
    since: datetime,
    before: datetime,
    without: Sequence[str],
    before_row: int | None = None,
    limit: int,
) -> list[int]:
    """Return the row ids of a version's requests that can be sent again, newest first.

    Requests without a complete answer, and requests with tool calls, images or other content that is not text, are left
    out.

    Args:
        since, before: start and end of the period in which the requests started.
        without: leave out requests whose prompt or answer contains any of these strings.
        before_row: leave out requests with this row id or a higher one.
        limit: maximum number of requests to return.
    """
    row = RequestRow
    query = (
        select(row.id)
        .where(answered_by(target), row.route == route, row.started_at >= since, row.started_at < before)
        .where(row.prompt.is_not(None), row.answer.is_not(None), row.outcome == RequestOutcome.COMPLETE)
        .where(func.coalesce(row.finish_reason, "") != "tool_calls")
        .where(row.answer.not_like(CALL), row.answer.not_like(f"%\n{CALL}"))
        .where(~or_(*(row.prompt.contains(text, autoescape=True) for text in (*_NOT_TEXT, *_TOOLS))))
        .where(*(~content.contains(text, autoescape=True) for content in (row.prompt, row.answer) for text in without))
        .order_by(row.id.desc())
        .limit(limit)
    )
    if before_row is not None:
        query = query.where(row.id < before_row)
    with Session(store) as session:
        return list(session.scalars(query))


def read_kept_request(store: Store, row_id: int) -> RequestRecord | None:
    """Return a request with its prompt and answer, or None if it has been deleted."""
    with Session(store) as session:
        row = session.get(RequestRow, row_id)
        if row is None or row.number is None or row.format is None:
            return None
        stored = {name: getattr(row, name) for name in RequestRecord._fields if name not in ("version", "format")}
        return RequestRecord(
            **stored | {"outcome": RequestOutcome(row.outcome)},
            version=VersionId(row.model, row.number),
            format=Format(row.format),
        )
