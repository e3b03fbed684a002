"""Fills every table of a store, including tables that will be added later, with rows made from the columns' types."""

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Engine as Store

from svc.store.audit import Action, AuditEntry, record_event
from svc.store.tables import AuditRow, Table
from tests.builders.actors import ALICE

ROWS = 5
LAST_ID = ROWS * 7
_FLOATS = (0.1, math.inf, -math.inf, 5e-324, -1.7976931348623157e308)
_TEXTS = ("plain", "B before a, as bytes", "a", "ünïcode \U0001f600", "line\nbreak 'quoted' \\ %s :x")


def fill(store: Store) -> None:
    """Add `ROWS` rows to every table. Their ids have gaps, and the last id is `LAST_ID`."""
    for number in range(ROWS):
        record_event(store, AuditEntry(Action.COLLECT, f"runs/{number}", ALICE))
    with store.begin() as connection:
        for table in Table.metadata.sorted_tables:
            if table.name != AuditRow.__tablename__:
                connection.execute(sa.insert(table), [_row(table, number) for number in range(ROWS)])


def read_tables(store: Store) -> dict[str, set[tuple[Any, ...]]]:
    """Return all rows, keyed by table."""
    with store.connect() as connection:
        return {
            table.name: {tuple(row) for row in connection.execute(sa.select(table))}
            for table in Table.metadata.sorted_tables
        }


def _row(table: sa.Table, number: int) -> dict[str, Any]:
    return {column.name: _value(column, number) for column in table.columns}


def _value(column: sa.Column[Any], number: int) -> Any:
    if column.nullable and not number:
        return None
    name = "id" if column.foreign_keys else column.name
    if column.type.python_type is int and name == "id" and (column.primary_key or column.foreign_keys):
        return (number + 1) * 7
    values = {
        bool: number % 2 == 0,
        bytes: bytes(range(number, 256)),
        datetime: datetime(2026, 3, 29, 1, 59, 59, 999_999, UTC) + timedelta(days=number),
        float: _FLOATS[number],
        int: (number - 2) * 2**61,
        str: f"{_TEXTS[number]} {name}",
    }
    return values[column.type.python_type]
