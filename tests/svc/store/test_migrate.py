"""Tests that a store is copied from SQLite to PostgreSQL completely, or else not at all."""

import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine as Store

from svc.errors import BusyError, IntegrityError, NotFoundError, RefusedError, RegistryError
from svc.files.lock import hold_lock
from svc.remote.server_url import LOCK_FILE
from svc.settings.settings import Settings
from svc.settings.storage import StoreSettings
from svc.store import database as database_module
from svc.store import migrate as migrate_module
from svc.store.audit import Action, AuditEntry, record_event, verify_chain
from svc.store.database import open_database, open_store
from svc.store.deployments import add_deployment, deployed_names
from svc.store.migrate import migrate
from svc.store.postgresql import connect
from svc.store.tables import Table
from svc.store.unavailable import StoreUnavailableError
from tests.builders.actors import ALICE
from tests.filled_store import LAST_ID, ROWS, fill, read_tables
from tests.new_store import new_store
from tests.postgresql import PostgresServer

pytestmark = pytest.mark.slow

TABLES = Table.metadata.sorted_tables
NUMBERED = [table.name for table in TABLES if table.autoincrement_column is not None]


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate_module, "_BATCH", 2)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a home whose store has rows in every table."""
    store = new_store(tmp_path / "home")
    fill(store)
    store.dispose()
    return tmp_path / "home"


@pytest.fixture
def target(postgresql: PostgresServer) -> Iterator[StoreSettings]:
    """Return the settings of a database without tables."""
    with postgresql.new_database() as settings:
        yield settings


@pytest.fixture
def copy(target: StoreSettings, tmp_path: Path) -> Iterator[Store]:
    """Return the target's store, with tables."""
    store = open_store(Settings(home=tmp_path / "other", store=target))
    yield store
    store.dispose()


def run(home: Path, *statements: str) -> None:
    """Change a home's store."""
    store = open_database(home)
    with store.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    store.dispose()


def has_tables(target: StoreSettings) -> bool:
    store = connect(target)
    with store.connect() as connection:
        names = sa.inspect(connection).get_table_names()
    store.dispose()
    return bool(names)


def test_store_migration_copies_every_table_with_all_values(home: Path, target: StoreSettings, copy: Store) -> None:
    result = migrate(home, target)
    assert result.rows == {table.name: ROWS for table in TABLES}
    assert result.replaced_texts == 0
    assert read_tables(copy) == read_tables(open_database(home))


def test_store_migration_creates_missing_tables_in_the_target_database(home: Path, target: StoreSettings) -> None:
    migrate(home, target)
    store = open_store(Settings(home=home, store=target))
    assert verify_chain(store).events == ROWS
    store.dispose()


def test_empty_store_can_be_migrated(tmp_path: Path, target: StoreSettings) -> None:
    new_store(tmp_path / "home").dispose()
    assert sum(migrate(tmp_path / "home", target).rows.values()) == 0


def test_sqlite_file_is_unchanged_after_store_migration(home: Path, target: StoreSettings) -> None:
    before = (home / "svc.db").read_bytes()
    migrate(home, target)
    assert (home / "svc.db").read_bytes() == before


def test_next_row_after_store_migration_gets_the_next_unused_id(home: Path, target: StoreSettings, copy: Store) -> None:
    migrate(home, target)
    with copy.connect() as connection:
        numbers = {
            name: connection.exec_driver_sql(f"SELECT nextval(pg_get_serial_sequence('{name}', 'id'))").scalar_one()
            for name in NUMBERED
        }
    assert numbers == dict.fromkeys(NUMBERED, LAST_ID + 1)


def test_ids_of_deleted_drift_items_are_not_reused_after_store_migration(
    home: Path, target: StoreSettings, copy: Store
) -> None:
    run(home, "DELETE FROM drift_items")
    migrate(home, target)
    with copy.connect() as connection:
        assert connection.exec_driver_sql("SELECT nextval('drift_items_id_seq')").scalar_one() == LAST_ID + 1


def test_new_events_can_be_added_to_the_audit_log_after_store_migration(
    home: Path, target: StoreSettings, copy: Store
) -> None:
    migrate(home, target)
    record_event(copy, AuditEntry(Action.COLLECT, "x", ALICE))
    report = verify_chain(copy)
    assert (report.events, report.fault) == (ROWS + 1, None)


def test_store_migration_succeeds_if_the_target_database_uses_a_different_collation(
    home: Path, target: StoreSettings, copy: Store
) -> None:
    with copy.begin() as connection:
        try:
            connection.exec_driver_sql('ALTER TABLE deployments ALTER name TYPE varchar COLLATE "en-x-icu"')
        except sa.exc.ProgrammingError:
            pytest.skip("this PostgreSQL has no ICU")
    migrate(home, target)
    assert len(deployed_names(copy)) == ROWS


def test_store_migration_is_refused_while_a_server_uses_the_tuneserve_home(home: Path, target: StoreSettings) -> None:
    with hold_lock(home / LOCK_FILE, "the home"), pytest.raises(BusyError, match="is in use by process"):
        migrate(home, target)
    assert not has_tables(target)


def test_store_migration_is_refused_while_the_sqlite_file_is_open(
    home: Path, target: StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_database(home)
    monkeypatch.setattr(database_module, "_BUSY_MS", 10)
    with store.connect() as idle:
        idle.exec_driver_sql("SELECT 1 FROM keys")
        with pytest.raises(BusyError, match=r"has .*svc\.db open"):
            migrate(home, target)
    store.dispose()
    assert not has_tables(target)


def test_no_other_process_can_use_the_sqlite_store_during_migration(
    home: Path, target: StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = migrate_module._compare
    other = sqlite3.connect(home / "svc.db", timeout=0)

    def read(*arguments: Any) -> None:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("SELECT 1 FROM keys")
        compare(*arguments)

    monkeypatch.setattr(migrate_module, "_compare", read)
    migrate(home, target)
    other.close()


def test_no_other_process_can_write_to_the_target_database_during_store_migration(
    home: Path, target: StoreSettings, copy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = migrate_module._compare

    def write(*arguments: Any) -> None:
        with copy.connect() as other:
            other.exec_driver_sql("SET LOCAL lock_timeout = '20ms'")
            with pytest.raises(StoreUnavailableError, match="another writer held a lock"):
                other.exec_driver_sql("INSERT INTO deployments VALUES ('late', now())")
        compare(*arguments)

    monkeypatch.setattr(migrate_module, "_compare", write)
    assert migrate(home, target).rows["deployments"] == ROWS


def test_store_migration_is_refused_if_the_target_database_has_rows(
    home: Path, target: StoreSettings, copy: Store
) -> None:
    add_deployment(copy, "tiny")
    with pytest.raises(RefusedError, match="is not empty: it has rows in deployments"):
        migrate(home, target)
    assert {name: len(rows) for name, rows in read_tables(copy).items() if rows} == {"deployments": 1}


def test_store_migration_is_refused_if_svc_db_is_from_a_different_release(home: Path, target: StoreSettings) -> None:
    run(home, "UPDATE alembic_version SET version_num = '0011'")
    with pytest.raises(RegistryError, match=r"svc\.db was written by another release: revision 0011"):
        migrate(home, target)
    assert not has_tables(target)


def test_store_migration_is_refused_if_the_target_database_is_from_a_different_release(
    home: Path, target: StoreSettings, copy: Store
) -> None:
    with copy.begin() as connection:
        connection.exec_driver_sql("UPDATE tuneserve_alembic_version SET version_num = 'initial'")
    with pytest.raises(RegistryError, match="was written by another release: revision initial"):
        migrate(home, target)


def test_store_migration_is_refused_if_the_target_database_is_not_utf8(home: Path, postgresql: PostgresServer) -> None:
    postgresql.run("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    with pytest.raises(RegistryError, match="has encoding LATIN1"):
        migrate(home, postgresql.settings("latin"))


def test_migrating_a_nonexistent_store_fails_without_creating_its_folder(tmp_path: Path, target: StoreSettings) -> None:
    with pytest.raises(NotFoundError, match=r"the store .*nowhere/svc\.db does not exist"):
        migrate(tmp_path / "nowhere", target)
    assert not (tmp_path / "nowhere").exists()


def test_store_migration_is_refused_if_the_audit_log_has_been_tampered_with(home: Path, target: StoreSettings) -> None:
    run(home, "DROP TRIGGER audit_no_UPDATE", "UPDATE audit SET subject = 'other' WHERE id = 3")
    with pytest.raises(IntegrityError, match=r"svc\.db has been altered at event 3"):
        migrate(home, target)
    assert not has_tables(target)


def test_store_migration_that_would_break_the_audit_log_is_refused(
    home: Path, target: StoreSettings, copy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # an event with a NUL, whose replacement has another hash
        for module in ("audit", "tables"):
            patch.setattr(f"svc.store.{module}.storable_text", lambda text: text)
        store = open_database(home)
        record_event(store, AuditEntry(Action.COLLECT, "a\0b", ALICE))
        store.dispose()
    with pytest.raises(IntegrityError, match=f"the copy has been altered at event {ROWS + 1}"):
        migrate(home, target)
    assert not any(read_tables(copy).values())


def test_corrupt_sqlite_file_is_reported_during_store_migration(home: Path, target: StoreSettings) -> None:
    path = home / "svc.db"
    path.write_bytes(path.read_bytes()[:8192])
    with pytest.raises(RegistryError, match=r"cannot read .*svc\.db: database disk image is malformed"):
        migrate(home, target)


def test_interrupted_store_migration_leaves_the_target_database_empty(
    home: Path, target: StoreSettings, copy: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(migrate_module, "_restart_sequences", interrupt)
        with pytest.raises(KeyboardInterrupt):
            migrate(home, target)
    assert not any(read_tables(copy).values())
    assert migrate(home, target).rows["requests"] == ROWS


def test_store_migration_interrupted_by_a_database_shutdown_leaves_the_target_empty(
    home: Path, target: StoreSettings, copy: Store, postgresql: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert = migrate_module._insert

    def cut_off(connection: sa.Connection, table: sa.Table, rows: Any) -> None:
        if table.name == "swaps":
            postgresql.stop()
        insert(connection, table, rows)

    monkeypatch.setattr(migrate_module, "_insert", cut_off)
    try:
        with pytest.raises(StoreUnavailableError):
            migrate(home, target)
    finally:
        postgresql.start()
    assert not any(read_tables(copy).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "NEW.prompt := 'changed'; RETURN NEW;",
            "the copy of table requests, row id=21 differs from the original in prompt",
        ),
        ("RETURN NULL;", "table requests, row id=21 is in only one of the two stores"),
    ],
    ids=["changed", "lost"],
)
def test_row_corrupted_during_store_migration_is_detected(
    home: Path, target: StoreSettings, copy: Store, change: str, message: str
) -> None:
    run(home, "DELETE FROM feedback", "DELETE FROM drift_items")  # they refer to requests
    with copy.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE FUNCTION damage() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {change} END $$"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER damage BEFORE INSERT ON requests FOR EACH ROW WHEN (NEW.id = 21) EXECUTE FUNCTION damage()"
        )
    with pytest.raises(IntegrityError, match=message):
        migrate(home, target)
    assert not any(read_tables(copy).values())


def test_characters_that_postgresql_cannot_store_are_replaced_by_question_marks(
    home: Path, target: StoreSettings, copy: Store
) -> None:
    run(home, "UPDATE requests SET prompt = CAST(x'6100628063' AS TEXT) WHERE id = 7")  # a, NUL, b, not UTF-8, c
    assert migrate(home, target).replaced_texts == 1
    with copy.connect() as connection:
        assert connection.exec_driver_sql("SELECT prompt FROM requests WHERE id = 7").scalar_one() == "a?b?c"


@pytest.mark.parametrize(
    ("table", "column", "value", "expected"),
    [
        ("requests", "status", "'private'", "an integer of at most 64 bits"),
        ("requests", "tokens_in", "1e30", "an integer of at most 64 bits"),
        ("requests", "valid", "'private'", "an integer"),
        ("requests", "started_at", "'private'", "a time as text"),
        ("requests", "started_at", "17", "a time as text"),
        ("requests", "seconds", "'private'", "a floating-point number"),
        ("requests", "prompt", "x'00'", "a text"),
        ("drift_items", "topic", "'private'", "bytes"),
    ],
)
def test_error_for_an_invalid_value_says_where_the_value_is_without_quoting_it(
    home: Path, target: StoreSettings, table: str, column: str, value: str, expected: str
) -> None:
    run(home, f"UPDATE {table} SET {column} = {value} WHERE id = 28")
    with pytest.raises(RegistryError, match=f"table {table}, row id=28, column {column}") as caught:
        migrate(home, target)
    assert caught.value.expected == expected
    assert "private" not in str(caught.value)


def test_error_for_a_row_rejected_by_postgresql_does_not_quote_its_values(
    home: Path, target: StoreSettings, copy: Store
) -> None:
    text = secrets.token_hex(2_000)
    run(home, f"UPDATE requests SET request_id = '{text}' WHERE id = 14")
    with pytest.raises(RegistryError, match=r"table requests, row id=14: index row .*ix_requests_request_id") as caught:
        migrate(home, target)
    assert text[:20] not in str(caught.value)
    assert not any(read_tables(copy).values())
