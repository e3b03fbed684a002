"""Tests that the store is created at first use, migrated to the newest schema, and survives interruptions."""

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine as Store
from sqlalchemy.exc import IntegrityError

from svc.errors import RegistryError
from svc.store.database import _use_wal, alembic_options, exclusive, open_database
from svc.store.desired import change_desired, read_desired
from svc.store.drift_items import add_items
from svc.store.requests import add_requests
from svc.store.tables import Table
from svc.store.unavailable import StoreUnavailableError
from svc.version import Format, Target, VersionId
from tests.builders.drift_items import item
from tests.builders.requests import RECORD, kept

ONE = Target(VersionId("tiny", 1), Format.GPTQ)


@pytest.mark.slow
def test_migrations_create_the_tables_defined_in_code(store: Store) -> None:
    with store.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, **alembic_options(store)})
        assert compare_metadata(context, Table.metadata) == []


def test_written_rows_persist_after_reopening_the_store(tmp_path: Path) -> None:
    change_desired(open_database(tmp_path), None, ONE, None)
    found = read_desired(open_database(tmp_path), "tiny")
    assert found is not None
    assert found.target == ONE


def test_store_with_the_current_schema_is_opened_without_a_migration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_database(tmp_path).dispose()
    monkeypatch.setattr("alembic.command.upgrade", lambda *_: pytest.fail("the newest migration has another name"))
    open_database(tmp_path)


def test_sqlite_store_is_unavailable_while_a_different_writer_locks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svc.store.database._BUSY_MS", 50)
    store = open_database(tmp_path)
    with exclusive(store), pytest.raises(StoreUnavailableError) as error, exclusive(store):
        pass
    assert error.value.shown.wrong == f"another writer held the lock on the store {tmp_path / 'svc.db'} for 0.05 s"


def test_store_is_unavailable_when_its_disk_is_full(tmp_path: Path) -> None:
    store = open_database(tmp_path)
    with store.begin() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=1")  # the pages that the file has stay usable
        with pytest.raises(StoreUnavailableError) as error:
            connection.exec_driver_sql("CREATE TABLE filler AS SELECT zeroblob(1000000) AS value")
    assert error.value.shown.wrong == f"no disk space is left for the store {tmp_path / 'svc.db'}"


def test_error_for_a_store_from_a_different_release_names_its_schema_revision(tmp_path: Path) -> None:
    store = open_database(tmp_path)
    with store.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0011'")
    with pytest.raises(RegistryError, match="was written by another release: revision 0011"):
        open_database(tmp_path)


@pytest.mark.slow
def test_upgrading_the_first_schema_adds_tables_and_keeps_rows(tmp_path: Path) -> None:
    store = open_database(tmp_path)
    add_requests(store, [RECORD])
    with store.begin() as connection:
        for table in ("batches", "job_checkpoints", "job_events", "jobs", "upload_parts", "uploads", "files"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
        for table in ("leases", "servers", "webhook_deliveries", "shadow_pairs", "rollout_steps", "rollouts"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
        for table in ("swaps", "served"):
            connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN server")
        for column in ("unit", "valid"):
            connection.exec_driver_sql(f"ALTER TABLE requests DROP COLUMN {column}")
        connection.exec_driver_sql("DROP TABLE drift_items")
        connection.exec_driver_sql("DROP TABLE drift_baselines")
        connection.exec_driver_sql("ALTER TABLE drift_alarms DROP COLUMN feature")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'initial'")
    store.dispose()
    migrated = open_database(tmp_path)
    test_migrations_create_the_tables_defined_in_code(migrated)
    assert kept(migrated) == [RECORD.request_id]
    assert add_items(migrated, ONE, [item(RECORD.request_id)]) == 1
    assert _schema(migrated) == _schema(open_database(tmp_path / "new"))


def _schema(store: Store) -> set[str]:
    """Return SQLite's definition of the new tables, ignoring spaces and the order of constraints."""
    tables = (
        *("drift_items", "drift_baselines", "rollouts", "rollout_steps", "shadow_pairs", "webhook_deliveries"),
        *("servers", "leases", "swaps", "served"),
        *("files", "uploads", "upload_parts", "jobs", "job_events", "job_checkpoints", "batches"),
    )
    query = f"SELECT sql FROM sqlite_master WHERE tbl_name IN {tables} AND sql IS NOT NULL"
    with store.connect() as connection:
        return {"".join(sorted(sql.split())) for sql in connection.scalars(sa.text(query))}


def test_sqlite_store_uses_wal_mode_with_full_synchronization(sqlite_store: Store) -> None:
    with sqlite_store.connect() as connection:
        assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(sa.text("PRAGMA synchronous")) == 2


def test_store_has_owner_only_permissions(tmp_path: Path) -> None:
    with open_database(tmp_path).connect():
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("svc.db*")}
    assert set(modes) == {"svc.db", "svc.db-wal", "svc.db-shm"}
    assert set(modes.values()) == {0o600}


def test_swap_step_referencing_a_nonexistent_swap_is_rejected(store: Store) -> None:
    with pytest.raises(IntegrityError, match=r"(?i)foreign key"), store.begin() as connection:
        connection.execute(sa.text("INSERT INTO swap_steps (swap_id, at, text) VALUES (99, '2026-01-01', 'x')"))


@pytest.mark.slow
def test_empty_database_can_be_opened_while_another_connection_holds_the_write_lock(tmp_path: Path) -> None:
    """SQLite itself does not wait for the lock when it switches a file to WAL mode."""
    other = sqlite3.connect(tmp_path / "svc.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.2, other.close)
    release.start()
    try:
        assert read_desired(open_database(tmp_path), "tiny") is None
    finally:
        release.join()


def test_unwritable_store_raises_error_immediately() -> None:
    """The store waits only for a lock held by another process."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
    cursor = Mock(execute=Mock(side_effect=error))
    with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
        _use_wal(cursor)
    assert cursor.execute.call_count == 1


OPENER = """
import sys
from pathlib import Path
from svc.store.database import open_database
from svc.store.desired import read_desired
print("ready", flush=True)
sys.stdin.readline()
print(read_desired(open_database(Path(sys.argv[1])), "tiny"))
"""


@pytest.mark.slow
def test_two_processes_can_open_a_new_store_concurrently(tmp_path: Path) -> None:
    """`svc serve` and `svc promote` may open the store of a new home at the same time."""
    arguments = [sys.executable, "-c", OPENER, str(tmp_path)]
    processes = [
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in processes] == ["None\n"] * 3


def test_failed_migration_is_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("alembic.command.stamp", fail)
        with pytest.raises(OSError, match="no space left"):
            open_database(tmp_path)
    assert read_desired(open_database(tmp_path), "tiny") is None
