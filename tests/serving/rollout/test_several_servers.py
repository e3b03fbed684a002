"""Rollouts on two servers that use one store: one leads, the other sends its clients to the same versions."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import event, update
from sqlalchemy.exc import OperationalError

from serving.rollout.reconciler import Reconciler
from serving.rollout.shadow_pairs import read_shadow_pairs
from svc.store.desired import Desired
from svc.store.leases import report_server
from svc.store.postgresql import connect
from svc.store.rollouts import RolloutOutcome, RolloutState
from svc.store.swaps import SwapResult
from svc.store.tables import LeaseRow, ServerRow
from tests.builders.actors import ANN
from tests.builders.rollouts import ALL, Users, changes, record, start
from tests.builders.rollouts import ended as ended_within
from tests.postgresql import SHARED, PostgresServer
from tests.serving.control import BODY, Control
from tests.serving.control import until as until_within
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow

ONE, TWO = f"{NAME}@1", f"{NAME}@2"
SHORT = ALL.model_copy(
    update={"shadow": 4, "canary": (50, 100), "min_units": 5, "max_errors": 0.5, "max_invalid": 0.5, "max_step_s": 60}
)
NO_SHADOW = SHORT.model_copy(update={"shadow": 0})
ENDLESS = ALL.model_copy(update={"shadow": 0, "canary": (50, 100), "max_errors": 0.001})
"""A rollout that stays at its first canary step."""
LEASE_S = 5.0
PAST = datetime(2020, 1, 1, tzinfo=UTC)
until = partial(until_within, timeout_s=20.0)
ended = partial(ended_within, timeout_s=90.0)


@dataclass
class Servers:
    """Two servers on one store. The first one leads.

    Attributes:
        cut_off: stores that do not respond.
    """

    first: Control
    second: Control
    cut_off: set[Store]

    @property
    def leader(self) -> Control | None:
        """The server that leads, if there is one."""
        return next((each for each in (self.first, self.second) if each.deployment.rollouts.leads), None)

    @asynccontextmanager
    async def run(self) -> AsyncIterator["Servers"]:
        """Serve with both, the first of which leads, while the context is active."""
        async with self.first.run():
            await until(lambda: self.leader is self.first)
            async with self.second.run():
                yield self

    async def kill_leader(self) -> None:
        """Kill the first server, and let its lease and its last report be old."""
        await self.first.kill()
        server = self.first.leadership.server
        aged = (
            update(ServerRow).where(ServerRow.id == server).values(seen_at=PAST),
            update(LeaseRow).where(LeaseRow.holder == server).values(until=PAST),
        )
        for each in aged:  # in transactions of their own: the second server locks the same rows
            with self.second.store.begin() as connection:
                connection.execute(each)


@pytest.fixture(autouse=True)
def _close_units_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.rollout.analysis.units.WINDOW_S", 0.01)


@pytest.fixture
def servers(
    postgresql: PostgresServer,
    postgresql_store: Store,
    memory_folder: Path,
    socket_folder: Path,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Servers]:
    """Two servers, each with its own home and connections."""
    for module in ("svc.store.leases", "serving.rollout.leadership", "serving.rollout.stored_rollout"):
        monkeypatch.setattr(f"{module}.LEASE_S", LEASE_S)
    monkeypatch.setattr("serving.rollout.leadership._REPORT_S", 0.1)
    monkeypatch.setattr("serving.rollout.store_retry.STORE_PAUSE_S", 0.05)
    cut_off: set[Store] = set()
    stores = [_store(postgresql, cut_off) for _ in range(2)]
    first, second = (_server(number, store, memory_folder, socket_folder) for number, store in enumerate(stores, 1))
    yield Servers(first, second, cut_off)
    for store in stores:
        store.dispose()


def _server(number: int, store: Store, homes: Path, socket_folder: Path) -> Control:
    """Return a server of versions 1 to 3."""
    sockets = socket_folder / str(number)
    sockets.mkdir()
    control = Control(homes / str(number), sockets, store=store, address=f"gpu-{number}:8000")
    for version in (1, 2, 3):
        make_version(control.registry, version)
    return control


def _store(postgresql: PostgresServer, cut_off: set[Store]) -> Store:
    """Return a store with its own connections, which fails while it is in `cut_off`."""
    store = connect(postgresql.settings(SHARED))

    def require_reachable(*_: Any) -> None:
        if store in cut_off:
            raise OperationalError("SELECT 1", {}, Exception("no route to host"))

    event.listen(store, "before_cursor_execute", require_reachable)
    return store


async def version_of(client: httpx.AsyncClient, user: str) -> str:
    """Return the version that answers a user."""
    response = await client.post("/v1/chat/completions", json=BODY | {"user": user})
    assert response.status_code == 200
    return response.headers["x-model-version"]


def splits(*controls: Control) -> bool:
    """Return whether all servers send clients to the candidate."""
    return all(each.sample("svc_rollout_candidate_ratio", model=NAME) > 0 for each in controls)


def unsplit(*controls: Control) -> bool:
    """Return whether no server sends clients to the candidate."""
    return not any(splits(each) for each in controls)


def rollback(control: Control) -> None:
    """Stop the rollout, as `svc rollback` does."""
    changes(control, ENDLESS).rollback(NAME, reason=None, actor=ANN)


def has_step(control: Control, text: str) -> bool:
    """Return whether a step of the rollout has a text."""
    return any(text in step for step in record(control).steps)


async def test_good_candidate_becomes_production_on_both_servers_when_it_passes_all_steps(servers: Servers) -> None:
    async with servers.run(), AsyncExitStack() as stack:
        users = []
        for control in (servers.first, servers.second):
            client = await stack.enter_async_context(control.client())
            users.append(await stack.enter_async_context(Users(client).asking(2)))
        start(servers.second, 2, SHORT)
        seen = await ended(servers.first)
        assert seen.outcome is RolloutOutcome.PROMOTED, (seen.why, seen.steps)
        for control in (servers.first, servers.second):
            await control.serves(target(2))
            await until(lambda control=control: control.park.alive == 1 and unsplit(control))  # type: ignore[misc]
    assert {status for each in users for status in each.statuses} == {200}
    counts = [
        each.sample("svc_rollouts_total", model=NAME, outcome="promoted") for each in (servers.first, servers.second)
    ]
    assert counts == [1, 0]


async def test_follower_swaps_to_its_loaded_candidate_engine_when_the_candidate_is_promoted(
    servers: Servers,
) -> None:
    async with servers.run(), servers.first.client() as client, Users(client).asking():
        start(servers.first, 2, SHORT)
        await until(lambda: splits(servers.second))
        await ended(servers.first)
        await servers.second.serves(target(2))
        await until(lambda: servers.second.park.alive == 1)
    assert len(servers.second.park.engines) == 2


async def test_rollout_fails_when_the_follower_cannot_serve_the_candidate(servers: Servers) -> None:
    make_version(servers.first.registry, 4)
    make_version(servers.second.registry, 4, probes_of="/elsewhere")
    async with servers.run(), servers.first.client() as client, Users(client).asking():
        start(servers.first, 4, SHORT)
        seen = await ended(servers.first)
        for control in (servers.first, servers.second):
            await control.serves(target(1), timeout_s=20)
    assert seen.outcome is RolloutOutcome.FAILED
    assert (seen.why or "").startswith("gpu-2:8000: ")


async def test_user_gets_the_same_version_from_both_servers_during_a_canary(servers: Servers) -> None:
    async with servers.run(), servers.first.client() as first, servers.second.client() as second:
        start(servers.first, 2, ENDLESS)
        await until(lambda: splits(servers.first, servers.second))
        users = [f"user {number}" for number in range(30)]
        versions = [[await version_of(client, user) for user in users] for client in (first, second)]
        rollback(servers.first)
        await ended(servers.first)
    assert versions[0] == versions[1]
    assert set(versions[0]) == {ONE, TWO}


async def test_rollout_passes_its_canary_when_only_the_follower_receives_client_requests(servers: Servers) -> None:
    async with servers.run(), servers.second.client() as client, Users(client).asking():
        start(servers.first, 2, NO_SHADOW)
        seen = await ended(servers.first)
    assert seen.outcome is RolloutOutcome.PROMOTED, (seen.why, seen.steps)


async def test_follower_sends_no_shadow_requests_during_the_shadow_step(servers: Servers) -> None:
    plan = ALL.model_copy(update={"shadow": 1000})
    async with servers.run(), servers.second.client() as client:
        start(servers.first, 2, plan)
        await until(lambda: record(servers.first).state is RolloutState.SHADOW)
        await until(lambda: servers.second.park.alive == 2 and servers.second.names.candidate is not None)
        for number in range(8):
            assert await version_of(client, f"user {number}") == ONE
        assert servers.second.reconciler.promoting
        assert servers.second.deployment.rollouts.active
        rollback(servers.first)
        seen = await ended(servers.first)
    assert read_shadow_pairs(servers.first.store, seen.id) == []


@pytest.mark.parametrize("state", [RolloutState.LOADING, RolloutState.SHADOW, RolloutState.CANARY])
async def test_rollout_is_completed_by_the_follower_when_the_leader_is_killed(
    servers: Servers, state: RolloutState
) -> None:
    if state is RolloutState.LOADING:
        servers.first.park.start_delay_s = 0.5
    async with servers.run(), servers.second.client() as client:
        start(servers.first, 2, SHORT if state is not RolloutState.CANARY else NO_SHADOW)
        await until(lambda: record(servers.second).state is state)  # and stays so without requests
        await servers.kill_leader()
        async with Users(client).asking() as users:
            seen = await ended(servers.second)
            await servers.second.serves(target(2))
        assert len(servers.second.park.engines) == 2
    assert seen.outcome is RolloutOutcome.PROMOTED, (seen.why, seen.steps)
    assert has_step(servers.second, f"gpu-2:8000 now leads the rollout; the rollout continues at {state}")
    assert set(users.statuses) == {200}


async def test_follower_stores_the_rollout_outcome_when_the_leader_is_killed_during_the_swap(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_to = Reconciler.change_to

    async def hang(reconciler: Reconciler, desired: Desired) -> SwapResult:
        if reconciler is servers.first.reconciler:
            await asyncio.Event().wait()
        return await change_to(reconciler, desired)

    monkeypatch.setattr(Reconciler, "change_to", hang)
    async with servers.run(), servers.first.client() as client, Users(client).asking():
        start(servers.first, 2, SHORT)
        await until(lambda: record(servers.second).state is RolloutState.SWITCHING)
        await servers.second.serves(target(2))
        assert record(servers.second).outcome is None
        await servers.kill_leader()
        assert (await ended(servers.second)).outcome is RolloutOutcome.PROMOTED


async def test_server_unaware_that_it_lost_its_lease_cannot_write_to_the_store(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers.first.run():
        await until(lambda: servers.leader is servers.first)
        start(servers.first, 2, ENDLESS)
        await until(lambda: splits(servers.first))

        async def report_nothing() -> None:
            pass

        monkeypatch.setattr(servers.first.leadership, "report", report_nothing)
        monkeypatch.setattr(servers.first.leadership, "_until", float("inf"))
        await asyncio.sleep(0.3)  # its last report is stored
        with servers.second.store.begin() as connection:
            connection.execute(update(LeaseRow).values(until=PAST))
        assert NAME in report_server(servers.second.store, "other", "gpu-3:8000", [NAME])
        rollback(servers.second)
        await until(lambda: unsplit(servers.first))
        await asyncio.sleep(0.5)  # it tries to store the outcome
        assert record(servers.second).outcome is None


async def test_follower_serves_only_production_when_memory_suffices_for_only_one_engine(servers: Servers) -> None:
    servers.second.park.room = "2 GB are missing"
    async with servers.run(), servers.first.client() as client, servers.second.client() as second:
        start(servers.first, 2, ENDLESS)
        await until(lambda: splits(servers.first) and has_step(servers.second, "gpu-2:8000: "))
        versions = {await version_of(second, f"user {number}") for number in range(10)}
        rollback(servers.second)
        assert (await ended(servers.first)).outcome is RolloutOutcome.CANCELLED
        async with Users(client).asking():
            start(servers.first, 2, SHORT)
            assert (await ended(servers.first)).outcome is RolloutOutcome.PROMOTED
            await servers.second.serves(target(2))
    assert versions == {ONE}


async def test_rollout_continues_when_the_candidate_engine_on_a_follower_server_dies(servers: Servers) -> None:
    async with servers.run(), servers.second.client() as client, Users(client).asking() as users:
        start(servers.first, 2, ENDLESS)
        await until(lambda: splits(servers.first, servers.second))
        servers.second.park.engines[-1].kill()
        await until(lambda: unsplit(servers.second))
        await until(lambda: has_step(servers.second, "gpu-2:8000: tuned@1 (merged) serves all clients"))
        assert splits(servers.first)
        assert record(servers.first).outcome is None
        killed = len(users.statuses)
        await until(lambda: len(users.statuses) > killed + 4)  # the dead engine's requests have failed
        answered = len(users.statuses)
        await until(lambda: len(users.statuses) > answered + 8)
        rollback(servers.first)
        await ended(servers.first)
    assert set(users.statuses[answered:]) == {200}


async def test_both_servers_stop_sending_clients_to_the_candidate_when_a_user_rolls_back(servers: Servers) -> None:
    async with servers.run():
        start(servers.first, 2, ENDLESS)
        await until(lambda: splits(servers.first, servers.second))
        async with asyncio.timeout(2):
            rollback(servers.second)
            await until(lambda: record(servers.first).outcome is not None and unsplit(servers.first, servers.second))
        for control in (servers.first, servers.second):
            await until(lambda control=control: control.park.alive == 1)  # type: ignore[misc]
    assert record(servers.first).outcome is RolloutOutcome.CANCELLED


async def test_dead_leader_does_not_delay_a_rollback_on_the_follower(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers.run():
        start(servers.first, 2, ENDLESS)
        await until(lambda: splits(servers.first, servers.second))
        for module in ("svc.store.leases", "serving.rollout.leadership"):
            monkeypatch.setattr(f"{module}.LEASE_S", 60.0)
        await asyncio.sleep(0.3)  # the leading server reports once more
        await servers.first.kill()
        rollback(servers.second)
        await until(lambda: unsplit(servers.second), timeout_s=2)
        assert record(servers.second).outcome is None
        await servers.kill_leader()
        assert (await ended(servers.second)).outcome is RolloutOutcome.CANCELLED
        await until(lambda: servers.second.park.alive == 1)


async def test_follower_sends_all_clients_to_production_when_it_cannot_reach_the_store(
    servers: Servers,
) -> None:
    async with servers.run(), servers.second.client() as client:
        start(servers.first, 2, ENDLESS)
        await until(lambda: splits(servers.first, servers.second))
        before = record(servers.first)
        servers.cut_off.add(servers.second.store)
        await until(lambda: unsplit(servers.second))
        assert {await version_of(client, f"user {number}") for number in range(10)} == {ONE}
        assert splits(servers.first)
        assert (record(servers.first).state, record(servers.first).outcome) == (before.state, None)
        servers.cut_off.clear()
        await until(lambda: splits(servers.second))
        rollback(servers.first)
        await ended(servers.first)
    assert len(servers.second.park.engines) == 2


async def test_follower_continues_the_rollout_when_the_leader_cannot_reach_the_store(
    servers: Servers,
) -> None:
    async with servers.run():
        start(servers.first, 2, ENDLESS)
        await until(lambda: splits(servers.first, servers.second))
        servers.cut_off.add(servers.first.store)
        await until(lambda: unsplit(servers.first))
        await until(lambda: has_step(servers.second, "gpu-2:8000 now leads the rollout"))
        assert splits(servers.second)
        servers.cut_off.clear()
        await until(lambda: splits(servers.first))
        assert servers.leader is servers.second
        rollback(servers.first)
        seen = await ended(servers.second)
        await until(lambda: unsplit(servers.first, servers.second))
    assert seen.outcome is RolloutOutcome.CANCELLED


async def test_server_started_during_the_canary_becomes_a_follower_of_the_rollout(servers: Servers) -> None:
    async with servers.first.run():
        start(servers.first, 2, ENDLESS)
        await until(lambda: splits(servers.first))
        async with servers.second.run():
            await until(lambda: splits(servers.second))
            rollback(servers.first)
            await until(lambda: unsplit(servers.second))


async def test_only_the_leader_ends_the_rollout_when_the_model_is_removed(servers: Servers) -> None:
    async with servers.run():
        start(servers.first, 2, ENDLESS)
        await until(lambda: splits(servers.first, servers.second))
        await servers.second.deployment.rollouts.abandon("the model was removed from the server")
        assert record(servers.first).outcome is None
        await servers.first.deployment.rollouts.abandon("the model was removed from the server")
        assert record(servers.first).outcome is RolloutOutcome.CANCELLED
        await until(lambda: unsplit(servers.first, servers.second))


async def test_engines_do_not_idle_while_a_rollout_has_no_leader(servers: Servers) -> None:
    report_server(servers.first.store, "other", "gpu-3:8000", [NAME])
    async with servers.second.run():
        start(servers.first, 2, ENDLESS)
        await until(lambda: servers.second.reconciler.promoting)
        seen = []
        for _ in range(200):
            seen.append(servers.second.reconciler.promoting)
            await asyncio.sleep(0.001)
        assert all(seen)
