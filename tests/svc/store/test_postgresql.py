"""Tests what is specific to a store in PostgreSQL: connections, outages, limits, and errors without secrets."""

import logging
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine as Store
from sqlalchemy import make_url
from sqlalchemy.exc import IntegrityError

from svc.errors import RegistryError, SettingsError
from svc.settings.settings import Settings
from svc.settings.storage import StoreSettings
from svc.store import postgresql as postgresql_module
from svc.store.audit import Action, AuditEntry, record_event, verify_chain
from svc.store.database import exclusive, open_store
from svc.store.deployments import add_deployment, deployed_names
from svc.store.desired import read_desired
from svc.store.postgresql import location
from svc.store.requests import add_requests
from svc.store.tables import DeploymentRow
from svc.store.unavailable import StoreUnavailableError
from tests.builders.actors import ALICE
from tests.builders.requests import RECORD
from tests.postgresql import PostgresServer

SECRET = "s3cret-pass"
NOWHERE = f"postgresql://svc:{SECRET}@127.0.0.1:1/store"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create the default home in the test's folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store(postgresql: PostgresServer) -> Store:
    return postgresql.empty()


@pytest.fixture
def database(postgresql: PostgresServer) -> Iterator[StoreSettings]:
    """Return the settings of a database without tables."""
    with postgresql.new_database() as settings:
        yield settings


def settings_of(url: str, password_file: Path | None = None) -> Settings:
    return Settings(store=StoreSettings(url=SecretStr(url), password_file=password_file))


def unavailable(settings: Settings) -> StoreUnavailableError:
    with pytest.raises(StoreUnavailableError) as caught:
        open_store(settings)
    return caught.value


def test_unreachable_store_error_does_not_contain_the_password() -> None:
    error = unavailable(settings_of(NOWHERE))
    assert error.shown.wrong.startswith("the store at 127.0.0.1:1/store is not responding: ")
    assert error.shown.todo.startswith("check that PostgreSQL is running")
    assert SECRET not in "".join(traceback.format_exception(error))


def test_rejected_database_connection_is_reported_with_its_reason(postgresql: PostgresServer) -> None:
    error = unavailable(Settings(store=postgresql.settings("missing")))
    assert 'rejected the connection: database "missing" does not exist' in error.shown.wrong
    assert "store.url" in error.shown.todo


def test_printed_settings_and_store_do_not_contain_the_database_password() -> None:
    settings = settings_of(NOWHERE)
    store = postgresql_module.connect(settings.store)
    shown = [repr(settings), str(settings), settings.model_dump_json(), repr(store), str(store.url)]
    assert not [text for text in shown if SECRET in text]


def test_password_is_read_from_its_file_without_the_line_ending(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(f"{SECRET}\n", "utf-8")
    store = postgresql_module.connect(settings_of("postgresql://svc@db/store", path).store)
    assert store.url.password == SECRET


@pytest.mark.parametrize("content", [None, b"", b"\xff"])
def test_unusable_password_file_is_rejected(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=str(path)):
        open_store(settings_of("postgresql://svc@db/store", path))


def test_password_in_both_url_and_file_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"store\.password_file"):
        open_store(settings_of(NOWHERE, tmp_path / "password"))


def test_missing_driver_is_reported_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(SettingsError, match=r"pip install 'tuneserve\[postgres\]'"):
        open_store(settings_of(NOWHERE))


def test_displayed_store_location_includes_the_default_port_but_no_user() -> None:
    assert location(make_url(f"postgresql://svc:{SECRET}@db/store")) == "db:5432/store"


@pytest.mark.slow
def test_store_works_again_after_the_database_restarts(postgresql: PostgresServer, store: Store) -> None:
    add_deployment(store, "tiny")
    postgresql.stop()
    postgresql.start()
    add_deployment(store, "other")
    assert deployed_names(store) == ["tiny", "other"]


@pytest.mark.slow
def test_store_access_fails_immediately_when_the_database_is_stopped(postgresql: PostgresServer, store: Store) -> None:
    add_deployment(store, "tiny")
    postgresql.stop()
    began = time.monotonic()
    try:
        for _ in range(3):
            with pytest.raises(StoreUnavailableError, match="is not responding"):
                deployed_names(store)
    finally:
        postgresql.start()
    assert time.monotonic() - began < 10
    assert deployed_names(store) == ["tiny"]


@pytest.mark.slow
def test_transaction_interrupted_by_a_database_shutdown_is_rolled_back(
    postgresql: PostgresServer, store: Store
) -> None:
    def write() -> None:
        with exclusive(store) as session:
            session.connection().exec_driver_sql("INSERT INTO deployments VALUES ('tiny', now())")
            postgresql.stop()
            session.connection().exec_driver_sql("SELECT 1")

    try:
        with pytest.raises(StoreUnavailableError):
            write()
    finally:
        postgresql.start()
    assert deployed_names(store) == []


def test_database_connection_is_replaced_if_the_server_is_read_only(store: Store) -> None:
    with store.connect() as connection:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        with pytest.raises(StoreUnavailableError, match="is read-only"):
            connection.exec_driver_sql("INSERT INTO deployments VALUES ('tiny', now())")
        assert connection.invalidated
    add_deployment(store, "tiny")


def test_store_is_unavailable_when_the_database_is_read_only(
    postgresql: PostgresServer, database: StoreSettings
) -> None:
    name = location(postgresql_module.connect(database).url).rpartition("/")[2]
    postgresql.run(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    error = unavailable(Settings(store=database))
    assert "is read-only" in error.shown.wrong
    assert "primary" in error.shown.todo


def test_store_is_unavailable_when_the_connection_pool_is_exhausted(
    postgresql: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_POOL_SIZE": 1, "_POOL_OVERFLOW": 0, "_POOL_TIMEOUT_S": 0.05}.items():
        monkeypatch.setattr(postgresql_module, name, value)
    store = postgresql_module.connect(postgresql.settings("postgres"))
    with store.connect(), pytest.raises(StoreUnavailableError, match="all 1 connections"):
        store.connect()
    store.dispose()


@pytest.mark.slow
def test_database_that_accepts_connections_without_responding_is_reported(
    postgresql: PostgresServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(postgresql_module._CONNECTION_OPTIONS, "connect_timeout", 2)
    settings = Settings(store=postgresql.settings("shared"))
    with postgresql.frozen():
        assert "timeout" in str(unavailable(settings))


def test_write_that_waits_too_long_for_a_lock_fails_with_the_reason(
    postgresql: PostgresServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql_module, "_SESSION", ("SET lock_timeout = '50ms'",))
    other = postgresql_module.connect(postgresql.settings("shared"))
    try:
        with exclusive(store), pytest.raises(StoreUnavailableError, match="another writer"):
            record_event(other, AuditEntry(Action.COLLECT, "x", ALICE))
    finally:
        other.dispose()


def test_row_rejected_by_postgresql_is_logged_without_its_values(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    bad = RECORD._replace(prompt="my mother's name", route=None)  # type: ignore[arg-type]
    try:
        add_requests(store, [bad])
    except IntegrityError:
        logging.getLogger("tests").exception("could not write")
    assert "null value in column" in caplog.text
    assert "my mother's name" not in caplog.text


def test_audit_log_cannot_be_truncated(store: Store) -> None:
    record_event(store, AuditEntry(Action.COLLECT, "x", ALICE))
    with pytest.raises(IntegrityError, match="append-only"), store.begin() as connection:
        connection.exec_driver_sql("TRUNCATE audit")
    assert verify_chain(store).events == 1


def test_error_for_a_database_from_a_different_release_names_its_schema_revision(database: StoreSettings) -> None:
    settings = Settings(store=database)
    store = open_store(settings)
    with store.begin() as connection:
        connection.exec_driver_sql("UPDATE tuneserve_alembic_version SET version_num = '0011'")
    store.dispose()
    with pytest.raises(RegistryError, match=f"{location(store.url)} was written by another release: revision 0011"):
        open_store(settings)


def test_database_can_be_shared_with_an_application_that_uses_alembic(database: StoreSettings) -> None:
    other = postgresql_module.connect(database)
    with other.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num varchar(32) NOT NULL)")
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('451aebb31d03')")
    for _ in range(2):  # creates the tables, then finds them
        open_store(Settings(store=database)).dispose()
    with other.connect() as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").all() == [("451aebb31d03",)]
    other.dispose()


@pytest.mark.slow
def test_failed_creation_of_tables_is_rolled_back(database: StoreSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("alembic.command.stamp", fail)
        with pytest.raises(OSError, match="no space left"):
            open_store(Settings(store=database))
    store = open_store(Settings(store=database))
    assert read_desired(store, "tiny") is None
    store.dispose()


@pytest.mark.slow
def test_database_with_an_encoding_other_than_utf8_is_rejected(postgresql: PostgresServer) -> None:
    postgresql.run("CREATE DATABASE ascii ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    with pytest.raises(RegistryError, match="has encoding SQL_ASCII"):
        open_store(Settings(store=postgresql.settings("ascii")))


def test_missing_database_privileges_error_says_how_to_grant_them(
    postgresql: PostgresServer, database: StoreSettings
) -> None:
    assert database.url is not None
    postgresql.run("DROP ROLE IF EXISTS guest")
    postgresql.run("CREATE ROLE guest LOGIN")
    name = location(postgresql_module.connect(database).url).rpartition("/")[2]
    postgresql.run("REVOKE CREATE ON SCHEMA public FROM PUBLIC", name)
    with pytest.raises(RegistryError, match="no permission to create tables") as caught:
        open_store(settings_of(database.url.get_secret_value().replace("//tests@", "//guest@")))
    assert "OWNER TO" in caught.value.todo


WRITER = """
import sys
from pathlib import Path
from pydantic import SecretStr
from svc.identity.actor import Actor
from svc.settings.settings import Settings
from svc.settings.storage import StoreSettings
from svc.store.audit import Action, AuditEntry, record_event
from svc.store.database import open_store
print("ready", flush=True)
sys.stdin.readline()
store = open_store(Settings(home=Path(sys.argv[2]), store=StoreSettings(url=SecretStr(sys.argv[1]))))
for number in range(25):
    record_event(store, AuditEntry(Action.COLLECT, f"{number}", Actor("user:x", "box")))
"""


@pytest.mark.slow
def test_several_processes_can_create_the_same_store_and_write_audit_events_concurrently(
    database: StoreSettings, tmp_path: Path
) -> None:
    assert database.url is not None
    arguments = [sys.executable, "-c", WRITER, database.url.get_secret_value(), str(tmp_path)]
    pipe, root = subprocess.PIPE, Path(__file__).parents[3]
    processes = [subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True, cwd=root) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate() and process.returncode for process in processes] == [0] * 3
    store = open_store(Settings(store=database))
    assert (verify_chain(store).events, verify_chain(store).fault) == (75, None)
    store.dispose()


def test_times_are_read_in_utc_regardless_of_the_session_time_zone(store: Store) -> None:
    add_deployment(store, "tiny")
    with store.connect() as connection:
        assert connection.exec_driver_sql("SHOW timezone").scalar_one() == "Asia/Kolkata"
    with exclusive(store) as session:
        row = session.get_one(DeploymentRow, "tiny")
        assert row.added_at.tzinfo is UTC
        assert abs((row.added_at - datetime.now(UTC)).total_seconds()) < 60
