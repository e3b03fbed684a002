"""Deletes requests on demand, with prompts, answers and feedback: by user, key or time."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, func, select
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.store.requests import delete_requests, hash_user
from svc.store.tables import FeedbackRow, RequestRow


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Numbers of requests that were deleted, or that would be.

    Attributes:
        contents: number of requests with a stored prompt or answer.
        feedback: number of requests with feedback.
    """

    requests: int
    contents: int
    feedback: int


def of_user(user: str) -> ColumnElement[bool]:
    """Return the condition for a user's requests, by the user's name as sent by the client."""
    return RequestRow.user_hash == hash_user(user)


def of_key(key_id: str) -> ColumnElement[bool]:
    """Return the condition for requests made with a key."""
    return RequestRow.key_id == key_id


def before(moment: datetime) -> ColumnElement[bool]:
    """Return the condition for requests before a time."""
    return RequestRow.started_at < moment


def count_requests(store: Store, which: ColumnElement[bool]) -> Forgotten:
    """Count the requests that meet a condition."""
    with_content = RequestRow.prompt.is_not(None) | RequestRow.answer.is_not(None)
    with Session(store) as session:
        requests = session.scalar(select(func.count()).select_from(RequestRow).where(which))
        contents = session.scalar(select(func.count()).select_from(RequestRow).where(which, with_content))
        joined = select(func.count()).select_from(FeedbackRow).join(RequestRow, RequestRow.id == FeedbackRow.request)
        return Forgotten(requests or 0, contents or 0, session.scalar(joined.where(which)) or 0)


def forget_requests(store: Store, which: ColumnElement[bool]) -> Forgotten:
    """Delete the requests that meet a condition, and erase their content from SQLite's file; return the numbers."""
    counts = count_requests(store, which)
    with store.connect() as connection:
        _pragma(connection, "secure_delete=ON")
        deleted, _ = delete_requests(connection, which)
        _pragma(connection, "wal_checkpoint(TRUNCATE)")
    return Forgotten(deleted, min(counts.contents, deleted), min(counts.feedback, deleted))


def _pragma(connection: Connection, text: str) -> None:
    connection.exec_driver_sql(f"PRAGMA {text}")
    connection.rollback()  # the pragma stays in force, and the next statement begins its own transaction
