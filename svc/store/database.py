"""Opens the SQL store: SQLite in WAL mode under the home, brought to the newest schema before use."""

from pathlib import Path

from sqlalchemy import Engine as Store
from sqlalchemy import create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_MS = 10_000  # two processes write: the server and the command line


def open_database(home: Path) -> Store:
    """Opens the store of a home, and creates or migrates it first."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / "svc.db"
    path.touch(mode=0o600)  # it may hold what users wrote; SQLite's other files get the same mode
    store = create_engine(f"sqlite:///{path}", hide_parameters=True)  # errors are logged; what users wrote is not
    event.listen(store, "connect", _prepare_sqlite)
    _migrate(store)
    return store


def _prepare_sqlite(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    # WAL: readers never wait for a writer. FULL: a swap that was reported survives a power cut.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={_BUSY_MS}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _migrate(store: Store) -> None:
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    head = ScriptDirectory.from_config(config).get_current_head()
    with store.connect() as connection:
        if MigrationContext.configure(connection).get_current_revision() == head:
            return
    from alembic import command

    with store.begin() as connection:
        # One process migrates, all of it or nothing; another one waits, and finds nothing left to do.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
