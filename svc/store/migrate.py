"""Copies a home folder's SQLite store to a PostgreSQL database.

All rows are copied in one transaction, which is committed only if the rows read back from PostgreSQL equal the rows in
SQLite. Rows are streamed, so memory usage does not depend on their number.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from svc.errors import IntegrityError, NotFoundError, RefusedError, RegistryError
from svc.files.lock import hold_lock
from svc.remote.server_url import LOCK_FILE
from svc.settings.storage import StoreSettings
from svc.store.audit import verify_chain
from svc.store.database import SQLITE_FILE, closing_store, open_new_store, sole_access, take_write_lock
from svc.store.postgresql import location
from svc.store.tables import StoredText, Table, storable_text
from svc.terminal import counting

Row = tuple[Any, ...]
Item = TypeVar("Item")

_TABLES = Table.metadata.sorted_tables
_BATCH = 200
"""Number of rows in memory at a time. A row with a long prompt may take a megabyte."""
_NOTHING_COPIED = "nothing was copied"
_STORED_TYPES: Mapping[type, tuple[type, str]] = {
    bool: (int, "an integer"),
    bytes: (bytes, "bytes"),
    datetime: (str, "a time as text"),
    float: (float, "a floating-point number"),
    int: (int, "an integer of at most 64 bits"),
    str: (str, "a text"),
}
"""For each column type, the type that SQLite returns for a valid value, and that type's name in error
messages. Values must be checked, because SQLite stores values of any type in any column."""


@dataclass(frozen=True, slots=True)
class Migration:
    """Result of copying a store.

    Attributes:
        target: host, port and name of the database.
        rows: number of rows, keyed by table.
        replaced_texts: number of texts in which question marks replace characters that stores no longer accept, such as
            NUL.
    """

    target: str
    rows: Mapping[str, int]
    replaced_texts: int


def migrate(home: Path, target: StoreSettings) -> Migration:
    """Copy a home folder's SQLite store to a PostgreSQL database.

    The SQLite file is not changed. If anything fails, the database is left without rows.

    Raises:
        BusyError: a server or another process is using the home folder.
        NotFoundError: the home folder has no SQLite store.
        RefusedError: the database already contains rows.
        RegistryError: one of the stores was written by another release, the database is not suitable, or it cannot
            store a value.
        IntegrityError: the audit log is altered, or a row of the copy differs.
        SettingsError: the driver is not installed, or the password cannot be read.
        StoreUnavailableError: the database is not responding.
    """
    path = home / SQLITE_FILE
    if not path.is_file():
        raise NotFoundError(
            f"the store {path} does not exist",
            todo="specify the home folder that contains the store to copy: svc --home FOLDER",
        )
    with hold_lock(home / LOCK_FILE, f"the home folder {home}"), sole_access(home) as connection:
        _require_unaltered_audit_log(connection, path)
        source = _Source(connection, path)
        with closing_store(open_new_store(target)) as store, store.begin() as copy:
            _take_empty(copy)
            rows = _copy(source, copy)
            replaced_texts = source.replaced_texts
            _compare(source, copy, rows)
            _require_unaltered_audit_log(copy, "the copy")
            _restart_sequences(connection, copy)
    return Migration(location(store.url), rows, replaced_texts)


class _Column:
    """Converts a column's values from their form in SQLite to the Python values that `Table` uses.

    Attributes:
        expected: kind of value that is valid in the column.
        replaced_texts: number of texts in which characters were replaced.
    """

    def __init__(self, column: sa.Column[Any], dialect: sa.Dialect) -> None:
        self.name = column.name
        self._type, self.expected = _STORED_TYPES[column.type.python_type]
        self._process = column.type.dialect_impl(dialect).result_processor(dialect, None)
        self._is_text = isinstance(column.type, StoredText)
        self.replaced_texts = 0

    def read(self, value: Any) -> Any:
        """Convert a value read from SQLite to the value that `Table` would return if this release had written it.

        Raises:
            ValueError: the value is not valid in this column.
        """
        if value is None:
            return None
        if type(value) is not self._type:
            raise ValueError
        if isinstance(value, str) and self._is_text:
            text = storable_text(value)
            self.replaced_texts += text != value
            return text
        return self._process(value) if self._process else value


class _Source:
    """Rows of the SQLite store.

    Attributes:
        replaced_texts: number of texts returned so far in which characters were replaced.
    """

    def __init__(self, connection: sa.Connection, path: Path) -> None:
        self.connection = connection
        self.path = path
        self.replaced_texts = 0

    def count(self) -> dict[str, int]:
        """Return the number of rows, keyed by table."""
        return {
            table.name: self.connection.scalars(sa.select(sa.func.count()).select_from(table)).one()
            for table in _TABLES
        }

    def rows(self, table: sa.Table) -> Generator[Row, None, None]:
        """Yield the rows of a table in the order of their primary keys.

        Raises:
            RegistryError: a value is not valid in its column.
        """
        columns = [_Column(column, self.connection.dialect) for column in table.columns]
        stored = (sa.type_coerce(column, sa.types.NullType()) for column in table.columns)
        query = sa.select(*stored).order_by(*table.primary_key.columns)
        with self.connection.execute(query, execution_options={"yield_per": _BATCH}) as result:
            for row in result:
                yield tuple(self._read(column, value, table, row) for column, value in zip(columns, row, strict=True))
        self.replaced_texts += sum(column.replaced_texts for column in columns)

    def _read(self, column: _Column, value: Any, table: sa.Table, row: Sequence[Any]) -> Any:
        try:
            return column.read(value)
        except ValueError:
            raise RegistryError(
                f"{self.path} has an invalid value in {_named(table, row)}, column {column.name}",
                expected=column.expected,
                todo=f"use sqlite3 to correct the value or delete the row, then retry; {_NOTHING_COPIED}",
            ) from None


def _require_unaltered_audit_log(connection: sa.Connection, where: object) -> None:
    fault = verify_chain(connection).fault
    if fault is not None:
        raise IntegrityError(
            f"the audit log in {where} has been altered at event {fault.id}: {fault.wrong}",
            todo=f"restore the home folder from a backup made before the alteration; {_NOTHING_COPIED}",
        )


def _take_empty(copy: sa.Connection) -> None:
    """Lock the target's tables until the transaction ends, and check that they have no rows."""
    copy.exec_driver_sql("SET LOCAL statement_timeout = 0")  # a large table may be sorted
    take_write_lock(copy)
    prepare = copy.dialect.identifier_preparer.format_table
    copy.exec_driver_sql(f"LOCK TABLE {', '.join(map(prepare, _TABLES))} IN SHARE ROW EXCLUSIVE MODE")
    filled = [table.name for table in _TABLES if copy.scalar(sa.select(sa.exists().select_from(table)))]
    if filled:
        raise RefusedError(
            f"the database {location(copy.engine.url)} is not empty: it has rows in {', '.join(filled[:3])}",
            expected="a database with no rows in tuneserve's tables",
            todo="create a new database: createdb --encoding UTF8 --template template0 NAME",
        )


def _copy(source: _Source, copy: sa.Connection) -> dict[str, int]:
    """Insert all rows into the target, and return the number of rows in each table."""
    rows = source.count()
    with counting("copying rows", sum(rows.values())) as advance:
        for table in _TABLES:
            with closing(source.rows(table)) as stored:
                for batch in _batches(stored):
                    _insert(copy, table, batch)
                    advance(len(batch))
    return rows


def _insert(copy: sa.Connection, table: sa.Table, rows: Sequence[Row]) -> None:
    statement = sa.insert(table)
    values = [dict(zip(table.columns.keys(), row, strict=True)) for row in rows]
    try:
        with copy.begin_nested():
            copy.execute(statement, values)
        return
    except DBAPIError as error:
        rejected = error
    for row, value in zip(rows, values, strict=True):  # find the row that was rejected
        try:
            with copy.begin_nested():
                copy.execute(statement, value)
        except DBAPIError as error:
            raise RegistryError(
                f"PostgreSQL cannot store {_named(table, row)}: {error.orig}",
                todo=f"use sqlite3 to correct or delete the row, then retry; {_NOTHING_COPIED}",
            ) from None
    raise rejected


def _compare(source: _Source, copy: sa.Connection, rows: Mapping[str, int]) -> None:
    """Compare all rows of both stores in the order of their primary keys.

    Raises:
        IntegrityError: a row differs.
    """
    with counting("comparing rows", sum(rows.values())) as advance:
        for table in _TABLES:
            with closing(source.rows(table)) as originals, closing(_copied_rows(copy, table)) as copied:
                for batch in _batches(zip_longest(originals, copied)):
                    for pair in batch:
                        if pair[0] != pair[1]:
                            raise _difference(table, *pair)
                    advance(len(batch))


def _copied_rows(copy: sa.Connection, table: sa.Table) -> Generator[Row, None, None]:
    # SQLite orders texts by their bytes.
    order = (
        sa.collate(column, "C") if isinstance(column.type, StoredText) else column
        for column in table.primary_key.columns
    )
    query = sa.select(table).order_by(*order)
    with copy.execute(query, execution_options={"yield_per": _BATCH}) as result:
        yield from map(tuple, result)


def _difference(table: sa.Table, original: Row | None, copied: Row | None) -> IntegrityError:
    row = original or copied or ()
    where = _named(table, row)
    if original is not None and copied is not None and _key(table, original) == _key(table, copied):
        pairs = zip(table.columns.keys(), original, copied, strict=True)
        differing = [name for name, first, second in pairs if first != second]
        wrong = f"the copy of {where} differs from the original in {', '.join(differing)}"
    else:
        wrong = f"{where} is in only one of the two stores"
    return IntegrityError(wrong, todo=f"check that nothing else writes to the database, then retry; {_NOTHING_COPIED}")


def _restart_sequences(source: sa.Connection, copy: sa.Connection) -> None:
    """Set PostgreSQL's sequences to continue after the last id that each table has used in SQLite.

    This does not use `setval`, which would remain in effect after a rollback.
    """
    # Contains only tables with AUTOINCREMENT, whose ids are never reused.
    used: dict[str, int] = dict(source.exec_driver_sql("SELECT name, seq FROM sqlite_sequence").all())
    for table in _TABLES:
        column = table.autoincrement_column
        if column is None:
            continue
        last = max(source.scalar(sa.select(sa.func.max(column))) or 0, used.get(table.name, 0))
        sequence = copy.scalar(sa.select(sa.func.pg_get_serial_sequence(table.name, column.name)))
        copy.exec_driver_sql(f"ALTER SEQUENCE {sequence} RESTART WITH {last + 1}")


def _batches(items: Iterable[Item]) -> Iterator[tuple[Item, ...]]:
    iterator = iter(items)
    return iter(lambda: tuple(islice(iterator, _BATCH)), ())


def _key(table: sa.Table, row: Sequence[Any]) -> dict[str, Any]:
    values = dict(zip(table.columns.keys(), row, strict=True))
    return {column.name: values[column.name] for column in table.primary_key.columns}


def _named(table: sa.Table, row: Sequence[Any]) -> str:
    """Return a table's name and a row's key, for error messages."""
    return f"table {table.name}, row {', '.join(f'{name}={value}' for name, value in _key(table, row).items())}"
