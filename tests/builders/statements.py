"""Collects the SQL statements that are sent to a store."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine as Store
from sqlalchemy import event


@contextmanager
def statements(store: Store) -> Iterator[list[str]]:
    """Collect the statements sent to the store while the context is active."""
    sent: list[str] = []

    def collect(connection: object, cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    event.listen(store, "before_cursor_execute", collect)
    yield sent
    event.remove(store, "before_cursor_execute", collect)
