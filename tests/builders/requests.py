"""Builds the records and rows of requests."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from svc.store.requests import RequestOutcome, RequestRecord, add_requests
from svc.store.tables import RequestRow
from svc.version import Format, Target, VersionId

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
PLENTY = 2**40
"""Limit in bytes that no test reaches."""
CHAT = "/v1/chat/completions"
TARGET = Target(VersionId("tiny", 2), Format.GPTQ)
RECORD = RequestRecord(
    request_id="req-1",
    started_at=NOON,
    model=TARGET.version.name,
    version=TARGET.version,
    format=TARGET.format,
    route=CHAT,
    status=200,
    outcome=RequestOutcome.COMPLETE,
    seconds=1.5,
    finish_reason="stop",
    first_token_seconds=0.25,
    tokens_in=10,
    tokens_out=5,
    temperature=0.7,
    max_tokens=64,
    client_request_id="mine",
)


def fill(store: Store, count: int, **fields: object) -> None:
    """Add rows one minute apart, with the newest at noon."""
    started = [NOON - timedelta(minutes=count - 1 - index) for index in range(count)]
    ids = [f"req-{index}" for index in range(count)]
    records = [RECORD._replace(request_id=id, started_at=at, **fields) for id, at in zip(ids, started, strict=True)]  # type: ignore[arg-type]
    add_requests(store, records)


def kept(store: Store) -> list[str]:
    """Return the ids of the requests in the store, oldest row first."""
    with Session(store) as session:
        return list(session.scalars(select(RequestRow.request_id).order_by(RequestRow.id)))
