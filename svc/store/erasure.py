"""Forgets requests on demand: rows, prompts and answers, and what people said of them, of a user, a key or a time."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, func, select
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from svc.store.requests import delete_requests, hash_user
from svc.store.tables import FeedbackRow, RequestRow


@dataclass(frozen=True, slots=True)
class Forgotten:
    """How much.

    Attributes:
        contents: of the requests, those of which prompt or answer were kept.
        feedback: of the requests, those of which people said something.
    """

    requests: int
    contents: int
    feedback: int


def of_user(user: str) -> ColumnElement[bool]:
    """The requests for a user, by what the client called it."""
    return RequestRow.user_hash == hash_user(user)


def of_key(key_id: str) -> ColumnElement[bool]:
    """The requests of a key."""
    return RequestRow.key_id == key_id


def before(moment: datetime) -> ColumnElement[bool]:
    """The requests that came before a moment."""
    return RequestRow.started_at < moment


def count_requests(store: Store, which: ColumnElement[bool]) -> Forgotten:
    """How much there is to forget."""
    with_content = RequestRow.prompt.is_not(None) | RequestRow.answer.is_not(None)
    with Session(store) as session:
        requests = session.scalar(select(func.count()).select_from(RequestRow).where(which))
        contents = session.scalar(select(func.count()).select_from(RequestRow).where(which, with_content))
        joined = select(func.count()).select_from(FeedbackRow).join(RequestRow, RequestRow.id == FeedbackRow.request)
        return Forgotten(requests or 0, contents or 0, session.scalar(joined.where(which)) or 0)


def forget_requests(store: Store, which: ColumnElement[bool]) -> Forgotten:
    """Removes them; what was forgotten is not left readable in the file of SQLite either."""
    found = count_requests(store, which)
    with store.connect() as connection:
        _pragma(connection, "secure_delete=ON")
        gone, _ = delete_requests(connection, which)
        _pragma(connection, "wal_checkpoint(TRUNCATE)")
    return Forgotten(gone, min(found.contents, gone), min(found.feedback, gone))


def _pragma(connection: Connection, text: str) -> None:
    connection.exec_driver_sql(f"PRAGMA {text}")
    connection.rollback()  # it is in force, and what comes next begins a transaction of its own
