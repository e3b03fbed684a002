"""Pages of rows, as OpenAI's lists need them: newest first, after the last row of the page before."""

from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Engine as Store
from sqlalchemy import Select, tuple_
from sqlalchemy.orm import Session

from svc.errors import NotFoundError
from svc.store.tables import BatchRow, FileRow, JobCheckpointRow, JobEventRow, JobRow

Row = TypeVar("Row", FileRow, JobRow, JobEventRow, JobCheckpointRow, BatchRow)


@dataclass(frozen=True, slots=True)
class Page:
    """The part of a list that a client asks for.

    Attributes:
        limit: maximum number of rows.
        after: id of the last row of the page before, or None for the first page.
    """

    limit: int
    after: str | int | None = None
    newest_first: bool = True


def read_page(store: Store, table: type[Row], query: Select[Row], page: Page) -> tuple[list[Row], bool]:
    """Return one page of the rows that a query selects, ordered by time and id, and whether more follow.

    Raises:
        NotFoundError: the query does not select the row after which the page begins.
    """
    at = table.at if issubclass(table, JobEventRow) else table.created_at
    with Session(store) as session:
        if page.after is not None:
            last = session.scalar(query.where(table.id == page.after))
            if last is None:
                raise NotFoundError(f"there is no entry {page.after!r} in this list", expected="the id of an entry")
            moment = last.at if isinstance(last, JobEventRow) else last.created_at
            place, position = tuple_(at, table.id), tuple_(moment, last.id)
            query = query.where(place < position if page.newest_first else place > position)
        order = (at.desc(), table.id.desc()) if page.newest_first else (at, table.id)
        rows = list(session.scalars(query.order_by(*order).limit(page.limit + 1)))
        session.expunge_all()
        return rows[: page.limit], len(rows) > page.limit
