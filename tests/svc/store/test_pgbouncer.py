"""Tests a store in PostgreSQL that is reached through PgBouncer, which pools sessions or transactions."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine as Store

from serving.store_changes import change_listener
from svc.settings.settings import Settings
from svc.store.audit import Action, AuditEntry, record_event, verify_chain
from svc.store.database import announce_change, open_store
from svc.store.deployments import deployed_names
from svc.store.desired import change_desired, read_desired
from svc.store.requests import add_requests
from tests.builders.actors import ALICE
from tests.builders.listeners import listening
from tests.builders.requests import RECORD, TARGET
from tests.pgbouncer import running_pgbouncer
from tests.postgresql import PostgresServer
from tests.serving.control import until

pytestmark = pytest.mark.slow

WRITERS, WRITES = 4, 10


@pytest.fixture(params=["session", "transaction"])
def mode(request: pytest.FixtureRequest) -> str:
    """Return a pool mode."""
    mode: str = request.param
    return mode


@pytest.fixture
def pooled(mode: str, postgresql: PostgresServer) -> Iterator[Store]:
    """Return an empty store that is reached through PgBouncer."""
    postgresql.empty()
    with running_pgbouncer(postgresql, mode) as settings:
        store = open_store(Settings(home=postgresql.folder / "home", store=settings))
        yield store
        store.dispose()


def test_concurrent_writers_succeed_through_pgbouncer(pooled: Store) -> None:
    """Writes often enough for the driver to use prepared statements."""

    def write(writer: int) -> None:
        for number in range(WRITES):
            record_event(pooled, AuditEntry(Action.COLLECT, f"{writer}-{number}", ALICE))
            add_requests(pooled, [RECORD] * 8)
            deployed_names(pooled)

    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(write, range(WRITERS)))
    assert (verify_chain(pooled).events, verify_chain(pooled).fault) == (WRITERS * WRITES, None)


async def test_notifications_are_trusted_only_if_pgbouncer_delivers_them(
    pooled: Store, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def promote() -> None:
        change_desired(pooled, read_desired(pooled, TARGET.version.name), TARGET, None)

    if mode == "transaction":  # several attempts
        monkeypatch.setattr(change_listener, "_ECHO_INTERVAL_S", 0.2)
        monkeypatch.setattr(change_listener, "_UNHEARD_PAUSE_S", 0.1)
    async with listening(pooled) as changes:
        if mode == "session":
            await until(lambda: changes.notified, 30)
        for _ in range(10):
            await asyncio.to_thread(promote)
            await asyncio.sleep(0.1)
            assert changes.notified == (mode == "session")


def test_notifications_received_on_pooled_connections_are_discarded(postgresql: PostgresServer) -> None:
    store = postgresql.empty()
    with store.connect() as connection:
        connection.exec_driver_sql("LISTEN tuneserve")
        announce_change(connection)
        connection.commit()
        connection.exec_driver_sql("UNLISTEN tuneserve")
        assert not getattr(connection.connection.dbapi_connection, "_notifies_backlog")  # noqa: B009
