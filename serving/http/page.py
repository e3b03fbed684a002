"""Pages of rows as in OpenAI's list endpoints: newest first, each starting after the last row of the previous page."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from sqlalchemy import ColumnElement, func, select, true, tuple_
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import NotFoundError, SvcError
from svc.store.tables import BatchRow, FileRow, JobCheckpointRow, JobEventRow, JobRow, Record, UploadRow

Row = TypeVar("Row", FileRow, JobRow, JobEventRow, JobCheckpointRow, BatchRow)
OwnedRow = TypeVar("OwnedRow", FileRow, UploadRow, JobRow, BatchRow)
REPEAT_WINDOW = timedelta(minutes=15)
"""Time after the creation of a job or batch during which an identical request returns that job or batch, unless it has
ended or is being cancelled. OpenAI's client waits 10 minutes for an answer, and then sends the request again."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")  # a client's text may contain characters that PostgreSQL rejects


@answered_with(404, ErrorCode.NOT_FOUND)
class EntryNotFoundError(NotFoundError):
    """Raised when no file, job or batch has the given id, or it belongs to another owner. Clients see the message.

    Attributes:
        param: name of the request's parameter that contains the id.
    """

    def __init__(self, wrong: str, *, expected: str, param: str = "id") -> None:
        super().__init__(wrong, expected=expected)
        self.param = param


@dataclass(frozen=True, slots=True)
class Page:
    """The part of a list that a client requests.

    Attributes:
        limit: maximum number of rows.
        after: id of the last row of the previous page, or None for the first page. Ids of events are
            numbers; all other ids are strings.
    """

    limit: int
    after: str | int | None = None
    newest_first: bool = True


def owned_by(table: type[OwnedRow], owner: str | None) -> ColumnElement[bool]:
    """Return an SQL condition that selects an owner's rows, or all rows if the owner is None."""
    return true() if owner is None else table.owner == owner


def read_page(
    store: Store,
    table: type[Row],
    kind: Callable[..., Record],
    which: ColumnElement[bool],
    page: Page,
) -> tuple[list[Record], bool]:
    """Return one page of the rows that match a condition, ordered by time and id, and whether another page follows.

    Args:
        kind: dataclass to which the rows are converted.

    Raises:
        EntryNotFoundError: the row after which the page starts does not match the condition.
    """
    query = select(table).where(which)
    at = table.at if issubclass(table, JobEventRow) else table.created_at
    with Session(store) as session:
        if page.after is not None:
            known = isinstance(page.after, int) or _ID.fullmatch(page.after)
            last = session.scalar(query.where(table.id == page.after)) if known else None
            if last is None:
                wrong = f"there is no entry {str(page.after)[:100]!r} in this list"
                raise EntryNotFoundError(wrong, expected="the id of an entry in this list", param="after")
            moment = last.at if isinstance(last, JobEventRow) else last.created_at
            place, position = tuple_(at, table.id), tuple_(moment, last.id)
            query = query.where(place < position if page.newest_first else place > position)
        order = (at.desc(), table.id.desc()) if page.newest_first else (at, table.id)
        rows = session.scalars(query.order_by(*order).limit(page.limit + 1)).all()
        return [row.read(kind) for row in rows[: page.limit]], len(rows) > page.limit


def find_row(
    session: Session, table: type[OwnedRow], id: str, owner: str | None, noun: str, *, param: str = "id"
) -> OwnedRow:
    """Return a row by its id.

    Args:
        owner: the owner whose rows are searched; None for all owners.
        noun: noun for a row, used in the message.
        param: name of the request's parameter that contains the id.

    Raises:
        EntryNotFoundError: the owner has no such row.
    """
    row = session.get(table, id) if _ID.fullmatch(id) else None
    if row is None or owner not in (None, row.owner):
        raise EntryNotFoundError(
            f"there is no {noun} {id[:100]!r}",
            expected="an id that belongs to this key; objects of other keys are hidden",
            param=param,
        )
    return row


def require_fewer(
    session: Session,
    table: type[OwnedRow],
    owner: str,
    unfinished: ColumnElement[bool],
    most: int,
    error: type[SvcError],
    *,
    noun: str,
    todo: str,
) -> None:
    """Check that an owner may create another row.

    Args:
        unfinished: SQL condition for the rows that count.
        most: maximum number of such rows of one owner.
        error: error to raise.
        noun: plural noun for the rows, used in the message.
    """
    query = select(func.count()).select_from(table).where(table.owner == owner, unfinished)
    if (count := session.scalar(query) or 0) >= most:
        raise error(f"this key has {count} unfinished {noun}", expected=f"fewer than {most}", todo=todo)
