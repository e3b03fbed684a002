"""What people say of answers: one word for each request, the last one counts."""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy import select

from svc.store.database import exclusive
from svc.store.tables import FeedbackRow, RequestRow
from svc.version import VersionId


class Rating(StrEnum):
    """Thumb up, thumb down."""

    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Feedback:
    """A person's word on one answer.

    Attributes:
        label: what kind of answer it was, in the caller's own words.
        correction: what the answer should have been; redacted.
    """

    rating: Rating
    label: str | None = None
    correction: str | None = None


@dataclass(frozen=True, slots=True)
class KeptFeedback:
    """Where a word went.

    Attributes:
        version: that gave the answer; None for a request that none answered.
        replaced: an earlier word on the same answer, which is forgotten.
        grown_bytes: what the row of the request takes more than before; less than 0 for a shorter correction.
    """

    version: VersionId | None
    replaced: Rating | None
    grown_bytes: int = 0


def keep_feedback(
    store: Store, request_id: str, feedback: Feedback, *, key_id: str | None = None
) -> KeptFeedback | None:
    """Keeps it with its request, the newest of that id.

    Args:
        key_id: only a request of this key is found; None: of any, as where there are no keys.

    Returns:
        None when no such request is kept: who asks does not learn whether another key has one.
    """
    newest = select(RequestRow).where(RequestRow.request_id == request_id).order_by(RequestRow.id.desc()).limit(1)
    if key_id is not None:
        newest = newest.where(RequestRow.key_id == key_id)
    with exclusive(store) as session:  # a second word at the same moment waits here, and finds the first
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


def _size(text: str | None) -> int:
    return len(text.encode("utf-8")) if text else 0
