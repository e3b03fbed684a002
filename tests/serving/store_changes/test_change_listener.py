"""Tests that servers are notified of changes in the store, and poll it while notifications do not arrive."""

import asyncio
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Connection, QueuePool
from sqlalchemy import Engine as Store
from sqlalchemy.exc import OperationalError

from serving.access.usage import Usage, UsageOf, add_usage
from serving.batches.rows import cancel_batch
from serving.fine_tuning.queue import release_job, take_job
from serving.fine_tuning.request_rows import change_wanted, queue_checked
from serving.fine_tuning.rows import Wanted
from serving.store_changes import change_listener, sqlite_listener
from serving.store_changes import changes as changes_module
from serving.store_changes.changes import Changes
from svc.identity.principal import Limits, Principal, Scope
from svc.settings.rollout import RolloutSettings
from svc.store import outage_log
from svc.store import postgresql as postgresql_module
from svc.store.audit import Action, AuditEntry
from svc.store.database import announce_change, take_write_lock
from svc.store.deployments import add_deployment, remove_deployment, set_deployments
from svc.store.desired import Desired, change_desired, read_desired
from svc.store.keys import Key, add_key, replace_secret, revoke_key
from svc.store.rollouts import (
    RolloutOutcome,
    RolloutState,
    active_rollout,
    begin_rollout,
    end_rollout,
    enter_state,
    stop_rollout,
)
from svc.store.statuses import JobStatus
from svc.version import Format, Target, VersionId
from tests.builders.actors import ANN
from tests.builders.batches import add_batch
from tests.builders.jobs import add_job
from tests.builders.listeners import listening
from tests.builders.statements import statements
from tests.postgresql import SHARED, PostgresServer
from tests.serving.control import until as until_within

NAME = "tuned"
ONE, TWO = (Target(VersionId(NAME, number), Format.MERGED) for number in (1, 2))
ENTRY = AuditEntry(Action.PROMOTE, str(ONE.version), ANN)
KEY = Key(Principal("abcd0123", "ci", frozenset({Scope.INFER}), None, Limits()), "hash", created_at=datetime.now(UTC))
until = partial(until_within, timeout_s=30)
LISTENERS = "FROM pg_stat_activity WHERE query = 'LISTEN tuneserve' AND datname = current_database()"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change_listener, "_PAUSE_S", 0.05)
    monkeypatch.setattr(sqlite_listener, "_PAUSE_S", 0.05)
    monkeypatch.setattr(sqlite_listener, "_INTERVAL_S", 0.01)
    monkeypatch.setattr(outage_log, "_failed_at", {})


@pytest.fixture
def store(postgresql: PostgresServer) -> Store:
    return postgresql.empty()


@asynccontextmanager
async def heard(store: Store) -> AsyncIterator[Changes]:
    """Run a listener while the context is active, and wait until changes are heard."""
    async with listening(store) as changes:
        await until(lambda: changes.notified)
        yield changes


def promote(store: Store) -> Desired:
    return change_desired(store, read_desired(store, NAME), ONE, None)


def request_rollout(store: Store) -> None:
    begin_rollout(store, promote(store), TWO, RolloutSettings(canary=(5, 100)), ENTRY)


async def test_promotion_notification_arrives_within_50_milliseconds(store: Store) -> None:
    async def heard_at(count: int) -> float:
        await changes.wait(count, 5.0)
        return time.monotonic()

    async with heard(store) as changes:
        took_s = []
        for _ in range(20):
            waiting = asyncio.create_task(heard_at(changes.count))
            began = time.monotonic()  # before the transaction, as a commit is heard before its caller continues
            await asyncio.to_thread(promote, store)
            took_s.append(await waiting - began)
    median_s = statistics.median(took_s)
    print(f"heard in {median_s * 1000:.1f} ms, at most {max(took_s) * 1000:.1f} ms")  # for `pytest -rP`
    assert median_s < 0.05


def _rollout(store: Store) -> int:
    record = active_rollout(store, NAME)
    assert record is not None
    return record.id


def _nothing(store: Store) -> None:
    pass


def _create_batch(store: Store) -> None:
    add_batch(store, id="batch-1", owner="ann")


def _create_job(store: Store, status: JobStatus = JobStatus.QUEUED) -> None:
    add_job(store, id="job-1", owner="ann", status=status)


def _take_job(store: Store) -> None:
    _create_job(store)
    assert take_job(store, "one", lambda job: True)


@pytest.mark.parametrize(
    ("before", "change"),
    [
        (_nothing, promote),
        (_nothing, request_rollout),
        (request_rollout, lambda store: stop_rollout(store, NAME, "slow", ENTRY)),
        (request_rollout, lambda store: enter_state(store, _rollout(store), RolloutState.CANARY)),
        (request_rollout, lambda store: end_rollout(store, _rollout(store), RolloutOutcome.FAILED, None)),
        (_nothing, lambda store: set_deployments(store, [NAME])),
        (_nothing, lambda store: add_deployment(store, NAME)),
        (_nothing, lambda store: remove_deployment(store, NAME)),
        (_nothing, lambda store: add_key(store, KEY, ENTRY)),
        (
            lambda store: add_key(store, KEY, ENTRY),
            lambda store: replace_secret(store, KEY.id, "new", previous_until=KEY.created_at, entry=ENTRY),
        ),
        (
            lambda store: add_key(store, KEY, ENTRY),
            lambda store: revoke_key(store, KEY.id, at=KEY.created_at, entry=ENTRY),
        ),
        (_nothing, _create_batch),
        (_create_batch, lambda store: cancel_batch(store, "batch-1", "ann", ENTRY)),
        (_nothing, _create_job),
        (
            lambda store: _create_job(store, JobStatus.VALIDATING_FILES),
            lambda store: queue_checked(store, "job-1", request="{}", recipe="", training_s=1.0, event="queued"),
        ),
        (_create_job, lambda store: change_wanted(store, "job-1", "ann", Wanted.PAUSE)),
        (_take_job, lambda store: release_job(store, "job-1", "one", "interrupted")),
    ],
    ids=[
        "promotion",
        "rollout",
        "stopped rollout",
        "state of a rollout",
        "ended rollout",
        "set of models",
        "added model",
        "removed model",
        "new key",
        "rotated key",
        "revoked key",
        "new batch",
        "cancelled batch",
        "new job",
        "checked job",
        "paused job",
        "returned job",
    ],
)
async def test_listener_is_notified_of_store_changes(
    any_store: Store, before: Callable[[Store], Any], change: Callable[[Store], Any]
) -> None:
    before(any_store)
    async with heard(any_store) as changes:
        count = changes.count
        await asyncio.to_thread(change, any_store)
        await until(lambda: changes.count > count)


async def test_rolled_back_transaction_sends_no_change_notification(any_store: Store) -> None:
    async with heard(any_store) as changes:
        count = changes.count
        with any_store.connect() as connection:
            take_write_lock(connection)
            announce_change(connection)
            connection.rollback()
        await asyncio.sleep(0.1)
        assert changes.count == count


async def test_echo_notifications_from_other_servers_are_not_treated_as_store_changes(store: Store) -> None:
    async with heard(store) as changes:
        count = changes.count
        async with heard(store):
            assert changes.count == count


@pytest.mark.slow
async def test_listener_polls_the_store_until_it_has_reconnected_after_a_lost_connection(
    postgresql: PostgresServer, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(change_listener, "_PAUSE_S", 1.0)
    monkeypatch.setattr(changes_module, "FALLBACK_POLL_S", 1000.0)
    async with heard(store) as changes:
        waiting = asyncio.create_task(changes.wait(changes.count, 1000.0))
        postgresql.run(f"SELECT pg_terminate_backend(pid) {LISTENERS}", SHARED)
        async with asyncio.timeout(10):
            await waiting
        assert not changes.notified
        await until(lambda: changes.notified)
        count = changes.count
        await asyncio.to_thread(promote, store)
        await until(lambda: changes.count > count)
    (record,) = caplog.records
    assert record.getMessage().startswith("could not listen for changes in the store; polling it instead: the store at")
    assert record.exc_info is None


@pytest.mark.slow
async def test_listener_reconnects_after_the_database_restarts(
    postgresql: PostgresServer, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    async with heard(store) as changes:
        await asyncio.to_thread(postgresql.stop)
        try:
            await until(lambda: not changes.notified)
            await asyncio.sleep(0.3)
            assert not changes.notified
        finally:
            await asyncio.to_thread(postgresql.start)
        await until(lambda: changes.notified)
        count = changes.count
        await asyncio.to_thread(promote, store)
        await until(lambda: changes.count > count)
    assert len(caplog.records) == 1


@pytest.mark.slow
async def test_notifications_are_not_trusted_when_echo_notifications_do_not_arrive(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(postgresql_module, "CHANNEL", "elsewhere")
    monkeypatch.setattr(change_listener, "_ECHO_INTERVAL_S", 0.05)
    monkeypatch.setattr(change_listener, "_UNHEARD_PAUSE_S", 0.05)
    async with listening(store) as changes:
        await until(lambda: caplog.records)
        await asyncio.sleep(0.3)  # further attempts
        assert changes.count == 0
        assert not changes.notified
        assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
            "notifications from the store are not arriving"
        ]
        monkeypatch.setattr(postgresql_module, "CHANNEL", "tuneserve")
        await until(lambda: changes.notified)


@pytest.mark.slow
async def test_notifications_are_no_longer_trusted_when_echo_notifications_stop_arriving(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_listener, "_ECHO_INTERVAL_S", 1.0)
    monkeypatch.setattr(change_listener, "_UNHEARD_PAUSE_S", 60.0)
    async with heard(store) as changes:
        await asyncio.sleep(2.5)
        assert changes.notified
        monkeypatch.setattr(change_listener, "announce_change", lambda connection, echo="": None)
        await until(lambda: not changes.notified)


async def test_cancelled_listener_leaves_no_database_connection_open(store: Store) -> None:
    def count() -> int:
        with store.connect() as connection:
            listeners: int = connection.exec_driver_sql(f"SELECT count(*) {LISTENERS}").scalar_one()
            return listeners

    async with heard(store):
        assert count() == 1
    await until(lambda: count() == 0)


def test_change_in_sqlite_sends_no_notification(sqlite_store: Store) -> None:
    with statements(sqlite_store) as sent:
        promote(sqlite_store)
    assert not [statement for statement in sent if "notify" in statement.lower()]


@pytest.mark.slow
async def test_change_in_sqlite_is_noticed_within_a_second(
    sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    async with heard(sqlite_store) as changes:
        count, began = changes.count, time.monotonic()
        await asyncio.to_thread(promote, sqlite_store)
        await changes.wait(count, 5.0)
        assert time.monotonic() - began < 1.0


async def test_usage_rows_written_to_sqlite_are_not_treated_as_store_changes(sqlite_store: Store) -> None:
    async with heard(sqlite_store) as changes:
        count = changes.count
        await asyncio.to_thread(add_usage, sqlite_store, {UsageOf(datetime.now(UTC), "abcd0123", NAME): Usage(1, 2, 3)})
        await asyncio.sleep(0.1)
        assert changes.count == count


async def test_sqlite_polling_recovers_after_read_errors(
    sqlite_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(connection: Connection) -> int:
        raise OperationalError("PRAGMA", {}, OSError("disk I/O error"))

    async with heard(sqlite_store) as changes:
        with monkeypatch.context() as patch:
            patch.setattr(sqlite_listener, "count_announced", fail)
            await until(lambda: not changes.notified)
        await until(lambda: changes.notified)
        count = changes.count
        await asyncio.to_thread(promote, sqlite_store)
        await until(lambda: changes.count > count)
    assert "could not listen for changes in the store" in caplog.text


async def test_sqlite_listener_occupies_no_pooled_connection(sqlite_store: Store) -> None:
    async with heard(sqlite_store):
        assert isinstance(sqlite_store.pool, QueuePool)
        assert sqlite_store.pool.checkedout() == 0
    await until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("changes")])
