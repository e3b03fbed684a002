"""Requests in the request log that a rollout assigned to one of its two versions, and their ratings."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy import Row, Select, func, select
from sqlalchemy.orm import Session

from serving.rollout.analysis.units import Arm, Request
from svc.store.feedback import Rating
from svc.store.requests import RequestOutcome
from svc.store.rollouts import RolloutRecord
from svc.store.tables import FeedbackRow, RequestRow

_FAILED = {RequestOutcome.REFUSED, RequestOutcome.ENGINE_ERROR, RequestOutcome.SERVER_ERROR}


def unit_text(rollout: int, unit: str, *, candidate: bool) -> str:
    """Return a rollout's assignment of a request to a version, as the text that the request log stores.

    Args:
        unit: hash of the user or conversation; empty if the request was assigned on its own.
    """
    return f"{rollout}:{Arm.CANDIDATE if candidate else Arm.PRODUCTION}:{unit}"


@dataclass(frozen=True, slots=True)
class AssignedRequest:
    """A request that a rollout assigned to a version.

    Attributes:
        id: id of the request's row.
        arm: the version that it was assigned to, even if production answered because no engine was running the
            candidate.
        unit: hash of the user or conversation; None if the request was assigned on its own.
        observed: the request as an observation of that version, or None if it is not evidence about the version.
    """

    id: int
    arm: Arm
    unit: str | None
    started_at: datetime
    observed: Request | None


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
    times = (row.started_at, row.seconds, row.first_token_seconds)
    columns = (row.id, row.unit, row.number, *times, row.outcome, row.valid)
    return select(*columns).where(row.model == record.name, row.unit.startswith(f"{record.id}:"))


def _assigned_request(row: Row[Any]) -> AssignedRequest:
    """Return a request as a rollout's evidence.

    Requests refused by the gateway never count. A request refused by an engine counts as failed, whichever
    version it was assigned to: clients' own mistakes cancel out, and a version that refuses requests that the other
    version answers is detected. If a client disconnects before the first token, the time that it waited is used as its
    time to the first token.
    """
    _, arm, unit = row.unit.split(":", 2)
    is_failed = row.outcome in _FAILED
    seconds = row.seconds if row.first_token_seconds is None else row.first_token_seconds
    observed = Request(
        unit=unit or None,
        arm=Arm(arm),
        ended_at=(row.started_at + timedelta(seconds=row.seconds)).timestamp(),
        failed=is_failed,
        valid=None if row.outcome == RequestOutcome.CLIENT_GONE else row.valid,
        first_token_s=None if is_failed else seconds,
    )
    by_gateway = row.outcome == RequestOutcome.REFUSED and row.number is None
    return AssignedRequest(row.id, Arm(arm), unit or None, row.started_at, None if by_gateway else observed)


def requests_per_day(store: Store, name: str) -> int:
    """Return the number of requests for a model in the last 24 hours."""
    since = datetime.now(UTC) - timedelta(days=1)
    query = select(func.count()).where(RequestRow.model == name, RequestRow.started_at >= since)
    with Session(store) as session:
        return session.scalar(query) or 0
