"""Deletes requests on demand, together with their prompts, answers and feedback. Requests are selected by
user, key or time.
"""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, func, select
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.store.database import is_sqlite
from svc.store.requests import delete_requests, hash_user
from svc.store.tables import FeedbackRow, RequestRow


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Counts of requests that were deleted, or that would be deleted.

    Attributes:
        contents: number of requests with a stored prompt or answer.
        feedback: number of requests with feedback.
    """

    requests: int
    contents: int
    feedback: int


def of_user(user: str) -> ColumnElement[bool]:
    """Return an SQL condition that selects a user's requests, given the user's name as sent by the client."""
    return RequestRow.user_hash == hash_user(user)


def of_key(key_id: str) -> ColumnElement[bool]:
    """Return an SQL condition that selects the requests made with a given API key."""
    return RequestRow.key_id == key_id


def before(moment: datetime) -> ColumnElement[bool]:
    """Return an SQL condition that selects requests made before a given time."""
    return RequestRow.started_at < moment


def count_requests(store: Store, which: ColumnElement[bool]) -> Forgotten:
    """Count the requests that match a condition."""
    with_content = RequestRow.prompt.is_not(None) | RequestRow.answer.is_not(None)
    with Session(store) as session:
        requests = session.scalar(select(func.count()).select_from(RequestRow).where(which))
        contents = session.scalar(select(func.count()).select_from(RequestRow).where(which, with_content))
        joined = select(func.count()).select_from(FeedbackRow).join(RequestRow, RequestRow.id == FeedbackRow.request)
        return Forgotten(requests or 0, contents or 0, session.scalar(joined.where(which)) or 0)


def forget_requests(store: Store, which: ColumnElement[bool]) -> Forgotten:
    """Delete the requests that match a condition, and return the counts. With SQLite, their contents are also erased
    from the database file.

    PostgreSQL frees the deleted rows at its next vacuum, and reuses their space later.
    """
    counts = count_requests(store, which)
    with store.connect() as connection:
        if is_sqlite(store):
            _pragma(connection, "secure_delete=ON")
        deleted, _ = delete_requests(connection, which)
        if is_sqlite(store):
            _pragma(connection, "wal_checkpoint(TRUNCATE)")
    return Forgotten(deleted, min(counts.contents, deleted), min(counts.feedback, deleted))


def _pragma(connection: Connection, text: str) -> None:
    connection.exec_driver_sql(f"PRAGMA {text}")
    connection.rollback()  # the pragma stays in force, and the next statement begins its own transaction
