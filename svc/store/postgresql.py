"""Connects to a store in PostgreSQL. Every wait has a time limit, and errors contain neither passwords nor users'
texts.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, create_engine, event, make_url
from sqlalchemy import Engine as Store
from sqlalchemy.engine.interfaces import DBAPIConnection, ExceptionContext
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, QueuePool

from svc.errors import RegistryError, SettingsError
from svc.settings.storage import StoreSettings
from svc.store.unavailable import StoreUnavailableError

if TYPE_CHECKING:
    from psycopg import AsyncConnection
    from psycopg.rows import TupleRow

WRITE_LOCK = 7_883_266_013_104_735_090
"""Key of the advisory lock that a writer holds until the end of its transaction. It is unlikely to equal the key of
another application in the same database."""
CHANNEL = "tuneserve"
"""Channel of notifications about changes; see `serving.store_changes.change_listener`."""
_POOL_SIZE, _POOL_OVERFLOW = 5, 10
_POOL_TIMEOUT_S = 10
_CONNECT_TIMEOUT_S = 5
_CONNECTION_OPTIONS = {
    "connect_timeout": _CONNECT_TIMEOUT_S,
    "application_name": "tuneserve",
    "client_encoding": "UTF8",
    # A server that disappeared from the network is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
    "target_session_attrs": "read-write",  # not a standby
}
_SESSION = (
    "SET statement_timeout = '60s'",
    "SET lock_timeout = '10s'",  # like SQLite's busy timeout
    "SET idle_in_transaction_session_timeout = '60s'",  # a stopped process must not hold the write lock
)
_TOO_SLOW = {"57014": "a statement took longer than 60 s", "55P03": "another writer held a lock for more than 10 s"}
_READ_ONLY = "25006"
_UNAVAILABLE = ("08", "53", "57P", "58", _READ_ONLY)
"""SQLSTATE classes for lost connections, insufficient resources, shutdowns and failures of the server's disk."""


class _Pool(QueuePool):
    """Connection pool that reports the store as unavailable if no connection becomes free in time."""

    def connect(self) -> PoolProxiedConnection:
        try:
            return super().connect()
        except PoolTimeoutError:
            raise StoreUnavailableError(
                RegistryError(
                    f"all {_POOL_SIZE + _POOL_OVERFLOW} connections to the store were in use for {self.timeout():g} s",
                    todo="retry, and check whether PostgreSQL is overloaded",
                )
            ) from None


def connect(settings: StoreSettings) -> Store:
    """Return a PostgreSQL store, without connecting to it yet.

    Raises:
        SettingsError: the driver is not installed, or the password cannot be read.
    """
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "store.url needs the driver for PostgreSQL, which is not installed",
            todo="install it: pip install 'tuneserve[postgres]'",
        ) from error
    url = _url(settings)
    store = create_engine(
        url,
        connect_args={name: value for name, value in _CONNECTION_OPTIONS.items() if name not in url.query},
        hide_parameters=True,  # errors are logged, without users' texts
        poolclass=_Pool,
        pool_size=_POOL_SIZE,
        max_overflow=_POOL_OVERFLOW,
        pool_timeout=_POOL_TIMEOUT_S,
        pool_pre_ping=True,
        isolation_level="READ COMMITTED",
    )
    event.listen(store, "connect", _prepare)
    where = location(url)
    event.listen(store, "handle_error", lambda context: _shown_error(context, where), retval=True)
    return store


@asynccontextmanager
async def listening(store: Store) -> AsyncIterator["AsyncConnection[TupleRow]"]:
    """Yield a separate connection to a store, which receives the notifications about changes.

    Raises:
        StoreUnavailableError: the connection could not be made, or was lost during the `with` block.
    """
    import psycopg

    _, parameters = store.dialect.create_connect_args(store.url)
    try:
        async with await psycopg.AsyncConnection.connect(
            **{**_CONNECTION_OPTIONS, **parameters}, autocommit=True
        ) as connection:
            await connection.execute(f"LISTEN {CHANNEL}")
            yield connection
    except psycopg.OperationalError as error:
        reason = error.diag.message_primary or _reason(str(error))
        raise StoreUnavailableError(_unavailable(reason, location(store.url))) from error


def location(url: URL) -> str:
    """Return a database's host, port and name, without user and password."""
    host = url.host or url.query.get("host") or "localhost"
    return (
        f"{host if isinstance(host, str) else ','.join(host)}:{url.port or url.query.get('port', 5432)}/{url.database}"
    )


def require_usable(connection: Connection) -> None:
    """Check a database before its tables are created.

    Raises:
        RegistryError: the database's encoding is not UTF-8, or the user in `store.url` may not create tables.
    """
    where = location(connection.engine.url)
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
    if encoding != "UTF8":
        raise RegistryError(
            f"the database {where} has encoding {encoding}",
            expected="UTF8",
            todo="create a database for the store: createdb --encoding UTF8 --template template0 NAME",
        )
    allowed = connection.exec_driver_sql("SELECT has_schema_privilege(current_schema(), 'CREATE')").scalar_one()
    if not allowed:
        raise RegistryError(
            f"the user in store.url has no permission to create tables in {where}",
            todo="make the user the owner of the database: ALTER DATABASE name OWNER TO user",
        )


def _url(settings: StoreSettings) -> URL:
    assert settings.url is not None  # noqa: S101 - the caller has checked it
    url = make_url(settings.url.get_secret_value()).set(drivername="postgresql+psycopg")
    if settings.password_file is None:
        return url
    if url.password is not None:
        raise SettingsError("store.url contains a password, and store.password_file is set", todo="remove one of them")
    return url.set(password=_read_password(settings.password_file))


def _read_password(path: Path) -> str:
    try:
        password = path.read_text("utf-8").rstrip("\r\n")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "the text is not UTF-8"
        raise SettingsError(
            f"cannot read the store's password from {path}: {why}", todo="correct store.password_file"
        ) from None
    if not password:
        raise SettingsError(f"the file {path} is empty", expected="the password of the PostgreSQL user in store.url")
    return password


def _prepare(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    for statement in _SESSION:
        cursor.execute(statement)
    cursor.close()
    connection.commit()
    # A pooler may deliver notifications for the listener here. Without a handler, the driver would keep them all.
    connection.add_notify_handler(_ignore)


def _ignore(notification: object) -> None:
    pass


def _shown_error(context: ExceptionContext, where: str) -> BaseException | None:
    """Return the error to raise instead of SQLAlchemy's, or None to raise SQLAlchemy's error."""
    import psycopg

    error = context.original_exception
    if not isinstance(error, psycopg.Error) or context.is_pre_ping:  # after a failed ping, the pool connects again
        return None
    state = error.sqlstate or ""
    reason = error.diag.message_primary or _reason(str(error))
    if state in _TOO_SLOW:
        reason = _TOO_SLOW[state]
    elif not (context.is_disconnect or context.connection is None or state.startswith(_UNAVAILABLE)):
        _hide_values(context, error, reason)
        return None
    if state == _READ_ONLY or "read-only" in reason:  # a server that became a standby
        context.is_disconnect = True
        wrong, todo = f"the store at {where} is read-only: {reason}", "name the primary server in store.url, then retry"
        return StoreUnavailableError(RegistryError(wrong, todo=todo))
    return StoreUnavailableError(_unavailable(reason, where))


def _unavailable(reason: str, where: str) -> RegistryError:
    """Return the error to show for a connection that failed."""
    if reason.startswith("FATAL:"):
        wrong = f"the store at {where} rejected the connection: {reason.removeprefix('FATAL:').strip()}"
        todo = "check the user, the password and the database of store.url, then retry"
    else:
        wrong = f"the store at {where} is not responding: {reason}"
        todo = "check that PostgreSQL is running there, then retry"
    return RegistryError(wrong, todo=todo)


def _reason(text: str) -> str:
    """Return the reason from libpq's message, without the address, which the caller already knows."""
    first = text.strip().partition("\n")[0]
    return first.rpartition(" failed: ")[2] if first.startswith("connection failed:") else first


def _hide_values(context: ExceptionContext, error: BaseException, reason: str) -> None:
    """Remove the details from an error before it is logged, because they may contain a row with users' texts."""
    error.args = (reason,)
    if context.sqlalchemy_exception is not None:
        context.sqlalchemy_exception.args = (f"({type(error).__name__}) {reason}",)
