"""Reads a version's answers and ratings for monitoring, in chronological order."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, and_, select
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.store.feedback import Rating
from svc.store.requests import RequestOutcome
from svc.store.tables import FeedbackRow, RequestRow
from svc.version import Target

_GOOD_STATUS = 200


@dataclass(frozen=True, slots=True)
class RatedAnswer:
    """A user's rating of one answer.

    Attributes:
        id: row id of the request.
        person: hash of the user's name as sent by the client; empty if the client sent none.
    """

    id: int
    request_id: str
    person: str
    given_at: datetime
    bad: bool
    corrected: bool


def was_answered(store: Store, target: Target, *, after: datetime | None, before: datetime) -> bool:
    """Return whether a version in a given format answered any request that started within a time period.

    Args:
        after: start of the period, or None for no lower bound.
    """
    good = RequestRow.status == _GOOD_STATUS, RequestRow.outcome == RequestOutcome.COMPLETE
    query = select(RequestRow.id).where(answered_by(target), *good, RequestRow.started_at < before)
    if after is not None:
        query = query.where(RequestRow.started_at > after)
    with Session(store) as session:
        return session.scalar(query.limit(1)) is not None


def texts_of(store: Store, request_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the stored prompts and answers of requests, keyed by the request id that the client received."""
    query = select(RequestRow).where(RequestRow.request_id.in_(request_ids), RequestRow.prompt.is_not(None))
    with Session(store) as session:
        return {row.request_id: (row.prompt or "", row.answer or "") for row in session.scalars(query)}


def read_ratings(store: Store, target: Target, *, newest: int) -> list[RatedAnswer]:
    """Return a version's newest ratings, up to `newest` of them, oldest first."""
    return _ratings(store, answered_by(target), newest)


def read_earlier_ratings(store: Store, target: Target, *, newest: int) -> list[RatedAnswer]:
    """Return ratings of the answers that a model gave before the first answer of the version in `target`.

    At most `newest` ratings, the most recent ones, are returned, oldest first.
    """
    first = select(RequestRow.id).where(answered_by(target)).order_by(RequestRow.id).limit(1)
    with Session(store) as session:
        began = session.scalar(first)
    if began is None:
        return []
    earlier = and_(RequestRow.model == target.version.name, RequestRow.id < began)
    return _ratings(store, and_(earlier, RequestRow.status == _GOOD_STATUS), newest)


def _ratings(store: Store, which: ColumnElement[bool], newest: int) -> list[RatedAnswer]:
    query = (
        select(FeedbackRow, RequestRow.request_id, RequestRow.user_hash)
        .join(RequestRow, RequestRow.id == FeedbackRow.request)
        .where(which)
        .order_by(FeedbackRow.given_at.desc(), FeedbackRow.request.desc())
        .limit(newest)
    )
    with Session(store) as session:
        return [
            RatedAnswer(
                row.request, request_id, user or "", row.given_at, row.rating == Rating.BAD, row.correction is not None
            )
            for row, request_id, user in reversed(session.execute(query).all())
        ]


def answered_by(target: Target) -> ColumnElement[bool]:
    """Return an SQL condition that selects requests answered by a version in a given format."""
    return and_(
        RequestRow.model == target.version.name,
        RequestRow.number == target.version.number,
        RequestRow.format == target.format.value,
    )
