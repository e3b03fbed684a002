"""Requests in the request log that a rollout assigned to one of its two versions, and their ratings."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy import Row, Select, func, select
from sqlalchemy.orm import Session

from svc.store.feedback import Rating
from svc.store.requests import RequestOutcome
from svc.store.rollouts import RolloutRecord
from svc.store.tables import FeedbackRow, RequestRow


def unit_text(rollout: int, unit: str, *, candidate: bool) -> str:
    """Return a rollout's assignment of a request to a version, as the text that the request log stores.

    Args:
        unit: hash of the user or conversation; empty if the request was assigned on its own.
    """
    return f"{rollout}:{'candidate' if candidate else 'production'}:{unit}"


@dataclass(frozen=True, slots=True)
class AssignedRequest:
    """A request that a rollout assigned to a version.

    Attributes:
        id: id of the request's row.
        candidate: whether it was assigned to the candidate, even if production answered because no engine
            was running the candidate.
        reached_engine: whether it was sent to an engine.
        unit: hash of the user or conversation; empty if the request was assigned on its own.
        valid: whether the answer is JSON; None if unknown.
    """

    id: int
    candidate: bool
    unit: str
    reached_engine: bool
    started_at: datetime
    seconds: float
    first_token_seconds: float | None
    outcome: RequestOutcome
    valid: bool | None


def read_assigned(store: Store, record: RolloutRecord, after: int) -> list[AssignedRequest]:
    """Return a rollout's requests whose row ids are above `after`, in the order in which they finished."""
    query = _assigned(record).where(RequestRow.id > after).order_by(RequestRow.id)
    if not after:
        query = query.where(RequestRow.started_at >= record.requested_at)
    with store.connect() as connection:
        return [_assigned_request(row) for row in connection.execute(query)]


def read_ratings(store: Store, record: RolloutRecord, since: datetime) -> list[tuple[AssignedRequest, datetime, bool]]:
    """Return the ratings given to a rollout's requests since the given time, oldest first.

    Each entry consists of the rated request, the time of the rating, and whether the rating is bad.
    """
    query = (
        _assigned(record)
        .add_columns(FeedbackRow.rating, FeedbackRow.given_at)
        .join(FeedbackRow, FeedbackRow.request == RequestRow.id)
        .where(FeedbackRow.given_at >= since)
        .order_by(FeedbackRow.given_at)
    )
    with store.connect() as connection:
        return [(_assigned_request(row), row.given_at, row.rating == Rating.BAD) for row in connection.execute(query)]


def _assigned(record: RolloutRecord) -> Select[*tuple[Any, ...]]:
    """Return a query for the request columns that a rollout needs, which never include texts."""
    row = RequestRow
    columns = (
        row.id,
        row.unit,
        row.number,
        row.started_at,
        row.seconds,
        row.first_token_seconds,
        row.outcome,
        row.valid,
    )
    return select(*columns).where(row.model == record.name, row.unit.startswith(f"{record.id}:"))


def _assigned_request(row: Row[Any]) -> AssignedRequest:
    _, arm, unit = row.unit.split(":", 2)
    return AssignedRequest(
        id=row.id,
        candidate=arm == "candidate",
        unit=unit,
        reached_engine=row.number is not None,
        started_at=row.started_at,
        seconds=row.seconds,
        first_token_seconds=row.first_token_seconds,
        outcome=RequestOutcome(row.outcome),
        valid=row.valid,
    )


def requests_per_day(store: Store, name: str) -> int:
    """Return the number of requests for a model in the last 24 hours."""
    since = datetime.now(UTC) - timedelta(days=1)
    query = select(func.count()).where(RequestRow.model == name, RequestRow.started_at >= since)
    with Session(store) as session:
        return session.scalar(query) or 0
