"""What a version answered and what people said of it, as streams: the view of requests that monitoring compares."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.store.feedback import Rating
from svc.store.tables import FeedbackRow, RequestRow
from svc.version import Target

_GOOD_STATUS = 200


@dataclass(frozen=True, slots=True)
class AnsweredRequest:
    """One request that a version answered; the fields are those of `RequestRecord`.

    Attributes:
        id: of its row; grows in the order in which requests ended.
        logprob: mean of the answer's tokens, nats; None where it was not scored, or not yet.
    """

    id: int
    request_id: str
    started_at: datetime
    prompt: str | None
    answer: str | None
    finish_reason: str | None
    tokens_out: int | None
    temperature: float | None
    max_tokens: int | None
    logprob: float | None


@dataclass(frozen=True, slots=True)
class RatedAnswer:
    """A person's word on one answer.

    Attributes:
        id: of the request's row.
    """

    id: int
    request_id: str
    given_at: datetime
    bad: bool
    corrected: bool


def answered_ids(store: Store, target: Target, *, after: int, newest: int, with_content: bool) -> list[int]:
    """Rows that were answered, in order.

    Args:
        after: rows up to this id are left out.
        newest: so many at most.
        with_content: only those whose prompt and answer are kept.
    """
    query = select(RequestRow.id).where(answered_by(target), RequestRow.status == _GOOD_STATUS, RequestRow.id > after)
    if with_content:
        query = query.where(RequestRow.prompt.is_not(None), RequestRow.answer.is_not(None))
    with Session(store) as session:
        return list(session.scalars(query.order_by(RequestRow.id.desc()).limit(newest)))[::-1]


def content_is_kept(store: Store, target: Target) -> bool | None:
    """Whether any of the newest 1000 rows of a version has its prompt and answer; None where there is no row."""
    newest = (
        select(RequestRow.prompt.is_not(None).label("kept"))
        .where(answered_by(target))
        .order_by(RequestRow.id.desc())
        .limit(1000)
        .subquery()
    )
    with Session(store) as session:
        kept = session.scalar(select(func.max(newest.c.kept)))
        return None if kept is None else bool(kept)


def newest_id(store: Store) -> int:
    """The newest row's id; 0 where there is none. Ids begin anew when all rows were forgotten."""
    with Session(store) as session:
        return session.scalar(select(func.max(RequestRow.id))) or 0


def read_answered(store: Store, target: Target, ids: Sequence[int]) -> list[AnsweredRequest]:
    """The rows of a version with these ids, in order; those that were forgotten since are left out."""
    query = select(RequestRow).where(RequestRow.id.in_(ids), answered_by(target)).order_by(RequestRow.id)
    with Session(store) as session:
        return [row.read(AnsweredRequest) for row in session.scalars(query)]


def texts_of(store: Store, request_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The kept prompts and answers of requests, by what clients know them by."""
    query = select(RequestRow).where(RequestRow.request_id.in_(request_ids), RequestRow.prompt.is_not(None))
    with Session(store) as session:
        return {row.request_id: (row.prompt or "", row.answer or "") for row in session.scalars(query)}


def read_ratings(store: Store, target: Target, *, newest: int) -> list[RatedAnswer]:
    """The newest ratings of a version's answers, in the order in which they were given."""
    return _ratings(store, answered_by(target), newest)


def read_earlier_ratings(store: Store, target: Target, *, newest: int) -> list[RatedAnswer]:
    """The newest ratings of what other versions of the name, or other formats, answered before this one first did."""
    first = select(RequestRow.id).where(answered_by(target)).order_by(RequestRow.id).limit(1)
    with Session(store) as session:
        began = session.scalar(first)
    if began is None:
        return []
    earlier = and_(RequestRow.model == target.version.name, RequestRow.id < began)
    return _ratings(store, and_(earlier, RequestRow.status == _GOOD_STATUS), newest)


def _ratings(store: Store, which: ColumnElement[bool], newest: int) -> list[RatedAnswer]:
    query = (
        select(FeedbackRow, RequestRow.request_id)
        .join(RequestRow, RequestRow.id == FeedbackRow.request)
        .where(which)
        .order_by(FeedbackRow.given_at.desc(), FeedbackRow.request.desc())
        .limit(newest)
    )
    with Session(store) as session:
        return [
            RatedAnswer(row.request, request_id, row.given_at, row.rating == Rating.BAD, row.correction is not None)
            for row, request_id in reversed(session.execute(query).all())
        ]


def answered_by(target: Target) -> ColumnElement[bool]:
    """Rows of requests that a version in a format was to answer."""
    return and_(
        RequestRow.model == target.version.name,
        RequestRow.number == target.version.number,
        RequestRow.format == target.format.value,
    )
