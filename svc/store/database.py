"""Opens the SQL store: an SQLite database in WAL mode under the home, migrated to the latest schema before
use.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from sqlite3 import SQLITE_BUSY, OperationalError
from typing import TYPE_CHECKING

from sqlalchemy import Engine as Store
from sqlalchemy import create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from svc.errors import RegistryError
from svc.store.tables import Table

if TYPE_CHECKING:
    from alembic.config import Config

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_MS = 10_000  # two processes write: the server and the command line
_PAUSE_S = 0.01


def open_database(home: Path) -> Store:
    """Open the store of a home, creating or migrating it first if needed.

    Raises:
        RegistryError: the store was written by an incompatible release.
    """
    home.mkdir(parents=True, exist_ok=True)
    path = home / "svc.db"
    path.touch(mode=0o600)  # it may contain users' texts; SQLite's other files get the same mode
    store = create_engine(f"sqlite:///{path}", hide_parameters=True)  # errors are logged, without users' texts
    event.listen(store, "connect", _prepare_sqlite)
    _migrate(store)
    return store


@contextmanager
def exclusive(store: Store) -> Iterator[Session]:
    """Run the `with` block in an exclusive write transaction, so that no other writer can change what the block
    has read.
    """
    with Session(store) as session, session.begin():
        session.connection().exec_driver_sql("BEGIN IMMEDIATE")
        yield session


def _prepare_sqlite(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    # FULL: a swap that was reported survives a power cut.
    for pragma in ("synchronous=FULL", "foreign_keys=ON", f"busy_timeout={_BUSY_MS}"):
        cursor.execute(f"PRAGMA {pragma}")
    _use_wal(cursor)
    cursor.close()


def _use_wal(cursor: DBAPICursor) -> None:
    """Switch the database file to WAL mode, in which readers never wait for a writer. The setting is
    persistent.

    SQLite ignores its busy timeout here: when three processes opened a new store concurrently, one of them
    failed at once with "database is locked" in 14 of 300 attempts.

    Raises:
        OperationalError: another process kept the file locked, or the file cannot be written.
    """
    deadline = time.monotonic() + _BUSY_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except OperationalError as error:
            if error.sqlite_errorcode & 0xFF != SQLITE_BUSY or time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSE_S)


def _migrate(store: Store) -> None:
    from alembic.migration import MigrationContext

    with store.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    if current == _newest_revision():
        return
    from alembic import command
    from alembic.util import CommandError

    config = _configuration()
    with store.begin() as connection:
        # One process migrates, all or nothing; others wait, and then find nothing to do.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        config.attributes["connection"] = connection
        if current is None:
            Table.metadata.create_all(connection)
            command.stamp(config, "head")
            return
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise RegistryError(
                f"{store.url.database} was written by another release: revision {current}",
                expected=f"revision {_newest_revision()}",
                todo="use the release that wrote the tables, or another SVC_HOME",
            ) from error


@cache
def _newest_revision() -> str | None:
    """Return the newest migration revision. It is cached, because finding it executes every migration script."""
    from alembic.script import ScriptDirectory

    newest: str | None = ScriptDirectory.from_config(_configuration()).get_current_head()
    return newest


def _configuration() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    return config
