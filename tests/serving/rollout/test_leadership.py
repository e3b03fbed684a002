"""Tests that a server knows which models it leads, also while it cannot reach the store."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from serving.rollout.leadership import EVERYTHING, Leadership
from serving.store_changes.changes import Changes
from svc.store.leases import LEASE_S, Lease, LeaseLostError, report_server, running_servers
from svc.store.tables import ServerRow


def leadership(store: Store, clock: Callable[[], float] = lambda: 0.0, *, address: str = "gpu-1:8000") -> Leadership:
    return Leadership(store, Changes(), address, lambda: ["teams"], clock=clock)


def test_server_with_a_sqlite_store_leads_every_model_without_a_lease(store: Store) -> None:
    only = leadership(store)
    assert (only.server, only.leads("teams"), only.lease("teams")) == ("", True, None)


async def test_server_with_a_sqlite_store_does_not_report_liveness(store: Store) -> None:
    await leadership(store).report()
    with Session(store) as session:
        assert session.scalars(select(ServerRow)).all() == []


async def test_only_the_first_of_two_servers_leads_until_it_shuts_down(postgresql_store: Store) -> None:
    first, second = leadership(postgresql_store), leadership(postgresql_store, address="gpu-2:8000")
    await first.report()
    await second.report()
    assert [(each.leads("teams"), each.leads(EVERYTHING)) for each in (first, second)] == [(True, True), (False, False)]
    with pytest.raises(LeaseLostError):
        second.lease("teams")
    await first.close()
    await second.report()
    assert second.leads("teams")


async def test_server_that_cannot_reach_the_store_stops_leading_when_its_lease_ends(
    postgresql_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    cut_off = leadership(postgresql_store, lambda: now)
    await cut_off.report()

    def fail(*_: object) -> None:
        raise OperationalError("report", {}, Exception("no route to host"))

    monkeypatch.setattr("serving.rollout.leadership.report_server", fail)
    now = LEASE_S - 1
    await cut_off.report()
    assert cut_off.leads("teams")
    now = LEASE_S
    assert not cut_off.leads("teams")


async def test_lease_period_starts_when_the_report_is_sent_even_if_the_store_answers_slowly(
    postgresql_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def answer_slowly(*arguments: Any) -> dict[str, Lease]:
        nonlocal now
        leases = report_server(*arguments)
        now = LEASE_S - 1
        return leases

    monkeypatch.setattr("serving.rollout.leadership.report_server", answer_slowly)
    server = leadership(postgresql_store, lambda: now)
    await server.report()
    assert server.leads("teams")
    now = LEASE_S
    assert not server.leads("teams")


async def test_becoming_the_leader_wakes_tasks_that_wait_for_a_change(postgresql_store: Store) -> None:
    changes = Changes()
    server = Leadership(postgresql_store, changes, "gpu-1:8000", lambda: ["teams"])
    waiting = asyncio.create_task(changes.wait(changes.count, 60))
    await server.report()
    await asyncio.wait_for(waiting, 1)


@pytest.mark.slow
async def test_stopped_server_is_not_listed_even_if_a_liveness_report_was_in_progress(
    postgresql_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, began, go_on = leadership(postgresql_store), threading.Event(), threading.Event()

    def report_slowly(*arguments: Any) -> dict[str, Lease]:
        began.set()
        assert go_on.wait(5)
        return report_server(*arguments)

    monkeypatch.setattr("serving.rollout.leadership.report_server", report_slowly)
    reporting = asyncio.create_task(server.report())
    assert await asyncio.to_thread(began.wait, 5)
    reporting.cancel()
    closing = asyncio.create_task(server.close())
    await asyncio.sleep(0.2)
    go_on.set()
    await closing
    await asyncio.sleep(0.2)
    assert running_servers(postgresql_store) == {}


async def test_server_stops_even_if_the_store_is_frozen(
    postgresql_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    thawed = threading.Event()
    monkeypatch.setattr("serving.rollout.leadership.remove_server", lambda *_: thawed.wait(5))
    monkeypatch.setattr("serving.rollout.leadership._CLOSE_S", 0.1)
    try:
        await asyncio.wait_for(leadership(postgresql_store).close(), 2)
    finally:
        thawed.set()
