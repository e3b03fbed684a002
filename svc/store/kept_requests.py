"""Finds stored requests that can be replayed unchanged, or whose answers can be scored by likelihood, and stores the
scores.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.store.answered import answered_by
from svc.store.requests import RequestOutcome, RequestRecord
from svc.store.tables import RequestRow
from svc.version import Format, Target, VersionId

_CALL = '{"name": "%", "arguments": %}'
"""SQL pattern that matches a tool call in a stored answer. `answer_text` writes calls in this form, which differs from
the text that the model generated."""
_NOT_TEXT = ('"type": "image', '"type": "input_', '"type": "video', '"type": "audio', '"type": "file"')
_TOOLS = ('"tool_calls": ', '"tool_call_id": ', '"role": "tool"')
"""Substrings that occur in the stored JSON of messages only if the messages contain content other than text, or use
tools. They cannot occur in the text of a message, because quotes in it are escaped."""

_ENDS = ("stop", "length")
_BLANKS = " \t\r\n"
MOST_TOKENS = 2_048
"""Maximum total number of tokens in a scored prompt and its answer. vLLM does not budget memory for prompt
log-probabilities, and their JSON takes a hundred bytes per token."""


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """The stored prompt and answer of a request.

    Attributes:
        prompt: JSON of the messages.
    """

    id: int
    prompt: str
    answer: str


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
        .where(_is_plain(without), row.outcome == RequestOutcome.COMPLETE)
        .where(func.coalesce(row.finish_reason, "") != "tool_calls")
        .where(~or_(*(row.prompt.contains(text, autoescape=True) for text in (*_NOT_TEXT, *_TOOLS))))
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


def newest_unscored(
    store: Store, target: Target, *, route: str, since: datetime, without: Sequence[str], passed: Collection[int]
) -> KeptAnswer | None:
    """Return the newest greedy answer of a version in a given format that has not been scored yet.

    Args:
        route: the request's route.
        since: skip requests older than this.
        without: skip rows whose prompt or answer contains any of these strings.
        passed: ids of rows to skip, at most a few hundred.
    """
    query = (
        select(RequestRow.id, RequestRow.prompt, RequestRow.answer)
        .where(answered_by(target), _can_be_scored(without))
        .where(RequestRow.route == route, RequestRow.started_at >= since, RequestRow.id.not_in(passed))
        .order_by(RequestRow.started_at.desc())  # the index that also finds the hour: else all rows are scanned
        .limit(1)
    )
    with Session(store) as session:
        row = session.execute(query).first()
    return KeptAnswer(row.id, row.prompt or "", row.answer or "") if row else None


def keep_logprob(store: Store, row: int, logprob: float) -> None:
    """Store the score of a row's answer, unless the row has been deleted."""
    with store.begin() as connection:
        connection.execute(update(RequestRow).where(RequestRow.id == row).values(logprob=logprob))


def _can_be_scored(without: Sequence[str]) -> ColumnElement[bool]:
    return and_(
        RequestRow.status == 200,
        RequestRow.temperature == 0,
        RequestRow.finish_reason.in_(_ENDS),
        RequestRow.logprob.is_(None),
        RequestRow.tokens_in + RequestRow.tokens_out <= MOST_TOKENS,
        func.trim(RequestRow.answer, _BLANKS) != "",
        _is_plain(without),
    )


def _is_plain(without: Sequence[str]) -> ColumnElement[bool]:
    """Return an SQL condition that selects requests whose prompt and answer are stored, without any of the given
    strings, and whose answer has no tool call.
    """
    prompt, answer = RequestRow.prompt, RequestRow.answer
    return and_(
        prompt.is_not(None),
        answer.is_not(None),
        answer.not_like(_CALL),
        answer.not_like(f"%\n{_CALL}"),
        *(~content.contains(text, autoescape=True) for content in (prompt, answer) for text in without),
    )
