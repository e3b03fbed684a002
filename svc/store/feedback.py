"""Feedback on answers. Each request has at most one rating; a new rating replaces the old one."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from svc.store.database import exclusive
from svc.store.requests import RequestOutcome
from svc.store.tables import FeedbackRow, RequestRow
from svc.version import VersionId

_BATCH_ROWS = 100


class Rating(StrEnum):
    """A user's rating: thumbs up or thumbs down."""

    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Feedback:
    """A user's feedback on one answer.

    Attributes:
        label: the caller's own category for the answer.
        correction: the correct answer, redacted.
    """

    rating: Rating
    label: str | None = None
    correction: str | None = None


@dataclass(frozen=True, slots=True)
class KeptFeedback:
    """Result of storing feedback.

    Attributes:
        version: version that gave the answer, or None if the request was not answered.
        replaced: the answer's earlier rating, now deleted, or None if there was none.
        grown_bytes: growth of the request's row in bytes; negative if the row became smaller.
    """

    version: VersionId | None
    replaced: Rating | None
    grown_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RatedText:
    """An answer with its feedback, and with the redacted prompt and answer if content is stored.

    Attributes:
        prompt: redacted JSON of the messages, or of a plain completion's prompt; None if content is not stored.
        answer: redacted text of the answer; None if content is not stored.
    """

    request_id: str
    prompt: str | None
    answer: str | None
    feedback: Feedback


def keep_feedback(
    store: Store, request_id: str, feedback: Feedback, *, key_id: str | None = None
) -> KeptFeedback | None:
    """Store feedback on the newest request with the given id, replacing any earlier feedback.

    Args:
        key_id: restricts the search to requests made with this key; None allows any key.

    Returns:
        The result, or None if no such request is stored or it belongs to another key.
    """
    newest = select(RequestRow).where(RequestRow.request_id == request_id).order_by(RequestRow.id.desc()).limit(1)
    if key_id is not None:
        newest = newest.where(RequestRow.key_id == key_id)
    with exclusive(store) as session:  # concurrent feedback waits here, and finds the first
        request = session.scalar(newest)
        if request is None:
            return None
        before = session.get(FeedbackRow, request.id)
        replaced = Rating(before.rating) if before else None
        grown = _size(feedback.correction) - _size(before.correction if before else None)
        request.bytes += grown
        session.merge(FeedbackRow.of(feedback, request=request.id, given_at=datetime.now(UTC)))
        version = VersionId(request.model, request.number) if request.number is not None else None
        return KeptFeedback(version, replaced, grown)


def read_rated_texts(
    store: Store, name: str, *, number: int | None = None, since: datetime | None = None
) -> Iterator[RatedText]:
    """Yield a model's complete answers that have feedback, oldest first.

    Args:
        number: number of the version that answered; None allows any version.
        since: leave out requests that started before this time.
    """
    complete = RequestRow.outcome == RequestOutcome.COMPLETE
    query = select(RequestRow, FeedbackRow).join(FeedbackRow, FeedbackRow.request == RequestRow.id)
    query = query.where(RequestRow.model == name, complete).order_by(RequestRow.id)
    if number is not None:
        query = query.where(RequestRow.number == number)
    if since is not None:
        query = query.where(RequestRow.started_at >= since)
    with Session(store) as session:
        for request, given in session.execute(query.execution_options(yield_per=_BATCH_ROWS)):
            feedback = Feedback(Rating(given.rating), given.label, given.correction)
            yield RatedText(request.request_id, request.prompt, request.answer, feedback)


def _size(text: str | None) -> int:
    return len(text.encode("utf-8")) if text else 0
