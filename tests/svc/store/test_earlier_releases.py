"""Tests that the stores of earlier releases are migrated, in both databases.

`tests/data/stores` has the dumps of stores that these releases wrote, named after their newest migration, from Python's
`iterdump` and `pg_dump --inserts`. They are never changed. A release with a new migration adds its own.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine as Store

from svc.settings.settings import Settings
from svc.store.audit import verify_chain
from svc.store.database import SQLITE_FILE, open_store
from svc.store.postgresql import connect
from svc.store.tables import Table
from tests.postgresql import PostgresServer

STORES = Path(__file__).parents[2] / "data" / "stores"
REVISIONS = sorted(path.name.split(".")[0] for path in STORES.glob("*.sqlite.sql"))


@pytest.fixture(params=[(revision, kind) for revision in REVISIONS for kind in ("sqlite", "postgresql")])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Yield the settings of each earlier release's store, in both databases."""
    revision, kind = request.param
    dump = (STORES / f"{revision}.{kind}.sql").read_text("utf-8")
    if kind == "sqlite":
        with closing(sqlite3.connect(tmp_path / SQLITE_FILE)) as connection:
            connection.executescript(dump)
        yield Settings(home=tmp_path)
        return
    server: PostgresServer = request.getfixturevalue("postgresql")
    with server.new_database() as settings:
        store = connect(settings)
        with store.begin() as connection:
            connection.exec_driver_sql(dump)
        store.dispose()
        yield Settings(home=tmp_path, store=settings)


@pytest.mark.slow
def test_rows_written_by_an_earlier_release_are_preserved_by_schema_migrations(settings: Settings) -> None:
    url = settings.store.url.get_secret_value() if settings.store.url else f"sqlite:///{settings.home / SQLITE_FILE}"
    earlier = sa.create_engine(url)
    rows = _rows(earlier)
    earlier.dispose()
    migrated = open_store(settings)
    try:
        inspector = sa.inspect(migrated)
        columns = {name: {each["name"] for each in inspector.get_columns(name)} for name in Table.metadata.tables}
        assert columns == {name: set(table.columns.keys()) for name, table in Table.metadata.tables.items()}
        kept = _rows(migrated)
        assert {name: [_columns_of(row, rows[name]) for row in kept[name]] for name in rows} == rows
        assert verify_chain(migrated).fault is None
    finally:
        migrated.dispose()


def _rows(store: Store) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every table, as the database's driver returns them."""
    with store.connect() as connection:
        return {
            name: [dict(row) for row in connection.execute(sa.text(f"SELECT * FROM {name} ORDER BY 1, 2")).mappings()]
            for name in sa.inspect(store).get_table_names()
            if "alembic" not in name
        }


def _columns_of(row: dict[str, Any], earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row without the columns that the earlier release did not have."""
    return {column: row[column] for column in earlier[0]} if earlier else row
