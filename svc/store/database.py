"""Opens the SQL store, migrated to the latest schema: an SQLite database in WAL mode in the home folder, or a
PostgreSQL database.

Both databases serialize writers. Every transaction that reads before it writes, or that changes several rows, must hold
the write lock (`exclusive` or `write_transaction`). PostgreSQL's default isolation level then suffices, row ids become
visible in increasing order, and no two writers deadlock.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from sqlite3 import SQLITE_BUSY, SQLITE_FULL, SQLITE_IOERR, OperationalError
from sqlite3 import Error as SqliteError
from typing import TYPE_CHECKING

from sqlalchemy import Connection, column, create_engine, event, inspect, select, table, text
from sqlalchemy import Engine as Store
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor, ExceptionContext
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from svc.errors import BusyError, RegistryError
from svc.settings.settings import Settings
from svc.settings.storage import StoreSettings
from svc.store.postgresql import CHANNEL, WRITE_LOCK, connect, location, require_usable
from svc.store.tables import Table
from svc.store.unavailable import StoreUnavailableError

if TYPE_CHECKING:
    from alembic.config import Config

SQLITE_FILE = "svc.db"
_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_MS = 10_000  # two processes write: the server and the command line
_PAUSE_S = 0.01
_NEWEST = "batches"
"""Newest migration. It is not read from Alembic, because importing Alembic would account for a tenth of a command's
startup time."""
_NOTIFY = text("SELECT pg_notify(:channel, :echo)").bindparams(channel=CHANNEL)
_VERSION_TABLES = {"sqlite": "alembic_version", "postgresql": "tuneserve_alembic_version"}
"""Name of the table that contains the schema's revision, keyed by dialect. It is not Alembic's default name in
PostgreSQL, because MLflow may use the same database and has a table with the default name."""


def open_store(settings: Settings) -> Store:
    """Open the store given in the settings, creating or migrating it first if needed.

    Raises:
        RegistryError: the store was written by an incompatible release, or the database is not suitable.
        SettingsError: the driver is not installed, or the password cannot be read.
        StoreUnavailableError: the database is not responding.
    """
    if settings.store.url is None:
        return open_database(settings.home)
    settings.home.mkdir(parents=True, exist_ok=True)  # for the files of its callers
    store = connect(settings.store)
    try:
        _migrate(store)
    except BaseException:
        store.dispose()
        raise
    return store


def open_database(home: Path) -> Store:
    """Open the SQLite store of a home folder, creating or migrating it first if needed.

    Raises:
        RegistryError: the store was written by an incompatible release.
    """
    home.mkdir(parents=True, exist_ok=True)
    path = home / SQLITE_FILE
    path.touch(mode=0o600)  # it may contain users' texts; SQLite's other files get the same mode
    store = create_engine(f"sqlite:///{path}", hide_parameters=True)  # errors are logged, without users' texts
    event.listen(store, "connect", _prepare_sqlite)
    event.listen(store, "handle_error", partial(_shown_error, path), retval=True)
    _migrate(store)
    return store


def open_new_store(settings: StoreSettings) -> Store:
    """Open the PostgreSQL store given in the settings, creating its tables if it has none. Unlike `open_store`, this
    does not migrate the tables of an earlier release.

    Raises:
        RegistryError: the tables belong to another release, or the database is not suitable.
        SettingsError: the driver is not installed, or the password cannot be read.
        StoreUnavailableError: the database is not responding.
    """
    store = connect(settings)
    try:
        with store.connect() as connection:
            revision = _revision(connection)
        if revision not in (None, _NEWEST):
            raise _other_release(
                location(store.url),
                revision,
                todo="create a new database: createdb --encoding UTF8 --template template0 NAME",
            )
        _migrate(store)
    except BaseException:
        store.dispose()
        raise
    return store


@contextmanager
def closing_store(store: Store) -> Iterator[Store]:
    """Yield a store, and close its connections after the `with` block. SQLite's last connection to a file removes the
    other files of the database.
    """
    try:
        yield store
    finally:
        store.dispose()


@contextmanager
def sole_access(home: Path) -> Iterator[Connection]:
    """Yield a read-only connection to the existing SQLite store of a home folder, with all other connections excluded.

    Bytes that are not UTF-8 are decoded to lone surrogates.

    Raises:
        BusyError: another process has the store open.
        RegistryError: the store was written by another release, or cannot be read.
    """
    path = home / SQLITE_FILE
    store = create_engine(f"sqlite:///{path}", hide_parameters=True)
    event.listen(store, "connect", _exclude_others)
    try:
        with closing_store(store), store.connect() as connection:
            revision = _revision(connection)
            if revision != _NEWEST:
                raise _other_release(
                    path,
                    revision,
                    todo="if an earlier release wrote the tables, migrate them with this release: svc keys list",
                )
            yield connection
    except DatabaseError as error:
        if not isinstance(error.orig, SqliteError):
            raise
        if error.orig.sqlite_errorcode & 0xFF == SQLITE_BUSY:
            raise BusyError(
                f"another process has {path} open",
                todo="stop `svc monitor` and all other commands that use this home folder",
            ) from None
        raise RegistryError(
            f"cannot read {path}: {error.orig}", todo="restore the home folder from a backup"
        ) from error


@contextmanager
def exclusive(store: Store) -> Iterator[Session]:
    """Run the `with` block in an exclusive write transaction, so that no other writer can change what the block
    has read.
    """
    with Session(store) as session, session.begin():
        take_write_lock(session.connection())
        yield session


@contextmanager
def write_transaction(store: Store) -> Iterator[Connection]:
    """Run the `with` block in an exclusive write transaction, like `exclusive`, for SQL statements outside an ORM
    session.
    """
    with store.begin() as connection:
        take_write_lock(connection)
        yield connection


def take_write_lock(connection: Connection) -> None:
    """Wait until no other transaction holds the write lock, and hold it until the transaction ends.

    This must be the transaction's first statement, because in SQLite it starts the transaction.
    """
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITE_LOCK})")


def announce_change(connection: Connection, echo: str = "") -> None:
    """Notify the servers that use a store when the transaction commits. In SQLite, this increments a number in the
    file's header, which servers read (serving.store_changes.sqlite_listener); the transaction must hold the write lock.

    Call this for every change that a server must act on immediately.

    Args:
        echo: text by which a listener recognizes its own test notification; empty for a real change.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(_NOTIFY, {"echo": echo})
    else:
        connection.exec_driver_sql(f"PRAGMA user_version = {count_announced(connection) + 1}")


def count_announced(connection: Connection) -> int:
    """Return how many changes have been announced to the servers that use an SQLite store."""
    return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())


def is_sqlite(store: Store) -> bool:
    """Return whether a store is an SQLite database."""
    return store.dialect.name == "sqlite"


def upsert(store: Store, table: type[Table]) -> sqlite.Insert | postgresql.Insert:
    """Return an INSERT statement that supports `on_conflict_do_...`. SQLAlchemy has one class for each database."""
    return sqlite.insert(table) if is_sqlite(store) else postgresql.insert(table)


def alembic_options(store: Store) -> dict[str, str]:
    """Return Alembic's options for a store."""
    return {"version_table": _VERSION_TABLES[store.dialect.name]}


def _revision(connection: Connection) -> str | None:
    """Return the newest migration applied to a store, or None if it has no tables yet."""
    name = _VERSION_TABLES[connection.dialect.name]
    if not inspect(connection).has_table(name):
        return None
    revision: str | None = connection.scalar(select(column("version_num")).select_from(table(name)))
    return revision


def _other_release(where: object, revision: str | None, *, todo: str) -> RegistryError:
    return RegistryError(
        f"{where} was written by another release: revision {revision}", expected=f"revision {_NEWEST}", todo=todo
    )


def _shown_error(path: Path, context: ExceptionContext) -> BaseException | None:
    """Return the error to raise if the database file is locked, or the disk is full or has failed.

    The result is None for any other problem, so that SQLAlchemy's own error is raised.
    """
    error = context.original_exception
    code = error.sqlite_errorcode & 0xFF if isinstance(error, OperationalError) else None
    if code == SQLITE_BUSY:
        wrong = f"another writer held the lock on the store {path} for {_BUSY_MS / 1000:g} s"
        return StoreUnavailableError(
            RegistryError(wrong, todo="retry; if the error recurs, check whether the disk is slow")
        )
    if code == SQLITE_FULL:
        return StoreUnavailableError(
            RegistryError(f"no disk space is left for the store {path}", todo="free space, then retry")
        )
    if code == SQLITE_IOERR:
        return StoreUnavailableError(
            RegistryError(f"cannot read or write the store {path}: {error}", todo="check the disk")
        )
    return None


def _prepare_sqlite(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    # FULL: a swap that was reported survives a power cut.
    for pragma in ("synchronous=FULL", "foreign_keys=ON", f"busy_timeout={_BUSY_MS}"):
        cursor.execute(f"PRAGMA {pragma}")
    _use_wal(cursor)
    cursor.close()


def _exclude_others(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    """Make a connection read-only, and lock the file against all other connections until this one is closed."""
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
    cursor.execute("PRAGMA locking_mode=EXCLUSIVE")  # in WAL mode, readers hold the lock too
    _use_wal(cursor)  # the first access, which locks the file
    cursor.execute("PRAGMA query_only=ON")
    cursor.close()


def _use_wal(cursor: DBAPICursor) -> None:
    """Switch the database file to WAL mode, in which readers never wait for a writer. The setting is
    persistent.

    SQLite ignores its busy timeout here: when three processes opened a new store concurrently, one of them immediately
    failed with "database is locked" in 14 of 300 attempts.

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
    with store.connect() as connection:
        current = _revision(connection)
    if current == _NEWEST:
        return
    from alembic import command
    from alembic.util import CommandError

    config = _configuration()
    with store.begin() as connection:
        # One process migrates, in a single transaction. Others wait, and then have nothing to do.
        if not is_sqlite(store):
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
        take_write_lock(connection)
        config.attributes.update(connection=connection, options=alembic_options(store))
        if current is None:
            if not is_sqlite(store):
                require_usable(connection)
            Table.metadata.create_all(connection)
            command.stamp(config, "head")
            return
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise _other_release(
                store.url.database if is_sqlite(store) else location(store.url),
                current,
                todo="use the release that wrote the tables, or another SVC_HOME or store.url",
            ) from error


def _configuration() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    return config
