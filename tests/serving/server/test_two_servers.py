"""Tests that two servers with one store serve the same version, and that what must happen once is done by one of them.

Each server is a control plane with its own home and its own engine double.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from serving.models.server_views import server_views
from serving.rollout.local_client import LocalAdministration
from serving.rollout.promotion import VersionChange
from serving.rollout.promotion_client import FollowedChange, follow
from serving.rollout.served import Began, Ended, begin_serving, served_spans
from svc.errors import SvcError
from svc.files.lock import hold_lock
from svc.remote.server_url import LOCK_FILE, ServerAddress
from svc.settings.monitoring import HoldoutSettings
from svc.store.desired import Desired, change_desired
from svc.store.leases import LEASE_S, report_server
from svc.store.swaps import SwapOutcome, SwapResult, begin_swap, end_swap, find_swap, server_swaps
from svc.store.tables import HoldoutRunRow, ServerRow
from svc.version import Alias
from tests.serving.control import Control, until
from tests.serving.versions import NAME, AliasBook, make_version, target

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]

FIRST, SECOND = "gpu-1:8000", "gpu-2:8000"


@pytest.fixture
def first(memory_folder: Path, socket_folder: Path, postgresql_store: Store) -> Control:
    return make(memory_folder, socket_folder, postgresql_store, AliasBook(), FIRST)


@pytest.fixture
def second(memory_folder: Path, socket_folder: Path, first: Control) -> Control:
    return make(memory_folder, socket_folder, first.store, first.book, SECOND)


def make(homes: Path, sockets: Path, store: Store, book: AliasBook, address: str) -> Control:
    place = address[4]
    (sockets / place).mkdir()
    control = Control(homes / place, sockets / place, store=store, book=book, address=address)
    for number in (1, 2, 3):
        make_version(control.registry, number, answered=3)
    return control


@pytest.fixture
async def both(first: Control, second: Control) -> AsyncIterator[tuple[Control, Control]]:
    """Yield two running servers. The first one leads."""
    async with first.run(), second.run():
        await until(lambda: len(served_spans(first.store, NAME)) == 2)
        yield first, second


async def follow_change(control: Control, desired: Desired) -> FollowedChange:
    administration = LocalAdministration(ServerAddress("http://127.0.0.1:9"), control.settings, control.store)
    change = VersionChange(desired.target, target(1), desired.generation)
    lock = hold_lock(control.settings.home / LOCK_FILE, "the home", url="http://127.0.0.1:9")
    async with asyncio.timeout(10):
        with lock:
            return await asyncio.to_thread(follow, administration, change, lambda step: None)


def outcomes(followed: FollowedChange) -> dict[str, SwapOutcome | None]:
    return {server.address: server.result.outcome if server.result else None for server in followed.servers}


def stop_reporting(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a server keep running without reporting, as if its last report were older than `LEASE_S`."""

    async def report() -> None:
        pass

    monkeypatch.setattr(control.leadership, "report", report)
    with Session(control.store) as session, session.begin():
        row = session.get_one(ServerRow, control.leadership.server)
        row.seen_at -= timedelta(seconds=LEASE_S + 1)


async def test_both_servers_swap_after_one_promotion(both: tuple[Control, Control]) -> None:
    first = both[0]
    followed = await follow_change(first, first.wish(2))
    assert outcomes(followed) == {FIRST: SwapOutcome.SUCCEEDED, SECOND: SwapOutcome.SUCCEEDED}
    assert [each.reconciler.actual.target for each in both] == [target(2), target(2)]


@pytest.mark.parametrize("place", [0, 1])
async def test_both_servers_restore_the_previous_version_if_one_cannot_load_the_promoted_version(
    first: Control, second: Control, place: int
) -> None:
    servers = (first, second)
    for number, server in enumerate(servers):
        make_version(server.registry, 4, probes_of="/elsewhere" if number == place else None)
    async with first.run(), second.run():
        await until(lambda: len(served_spans(first.store, NAME)) == 2)
        followed = await follow_change(first, first.wish(4))
        failed = followed.servers[place]
        assert failed.address == (FIRST, SECOND)[place]
        assert followed.result == failed.result
        assert failed.result and failed.result.outcome is SwapOutcome.RESTORED
        for server in servers:
            await server.serves(target(1))
        await until(lambda: first.reconciler.actual == second.reconciler.actual == first.desired())
        settled = first.desired()
        await asyncio.sleep(0.2)
        assert (first.desired(), settled.target, settled.previous) == (settled, target(1), None)


async def test_version_that_failed_on_another_server_does_not_become_desired_again(first: Control) -> None:
    """Two servers that each reject the other's version would change it forever."""
    make_version(first.registry, 4, probes_of="/elsewhere")
    report_server(first.store, "other", SECOND, [])
    swap = begin_swap(first.store, first.desired(), server="other")
    end_swap(first.store, swap, SwapResult(SwapOutcome.REFUSED, "no memory"))
    async with first.run():
        wish = first.wish(4)
        assert (await first.outcome(wish)).outcome is SwapOutcome.RESTORED
        await until(lambda: "failed on this server" in (first.reconciler.last_error or ""))
        await asyncio.sleep(0.1)
        assert first.desired() == wish
        assert first.reconciler.actual.target == target(1)


async def test_promotion_does_not_wait_for_a_server_that_stops_reporting(
    both: tuple[Control, Control], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = both
    second.double.reload_delay_s = 30
    following = asyncio.create_task(follow_change(first, first.wish(2)))
    await until(lambda: "/collective_rpc" in second.double.calls)
    await asyncio.sleep(0.1)
    assert not following.done()
    stop_reporting(second, monkeypatch)
    assert outcomes(await following) == {FIRST: SwapOutcome.SUCCEEDED, SECOND: None}


async def test_promotion_result_includes_a_server_that_stopped_during_the_promotion(
    first: Control, second: Control
) -> None:
    async with first.run(), AsyncExitStack() as stack:
        await stack.enter_async_context(second.run())
        await until(lambda: len(served_spans(first.store, NAME)) == 2)
        second.double.reload_delay_s = 30
        following = asyncio.create_task(follow_change(first, first.wish(2)))
        await until(lambda: "/collective_rpc" in second.double.calls)
        await asyncio.sleep(0.1)
        await stack.aclose()
        assert outcomes(await following) == {FIRST: SwapOutcome.SUCCEEDED, SECOND: None}


async def test_promotion_does_not_wait_for_a_server_that_started_with_the_promoted_version(
    first: Control, second: Control
) -> None:
    async with first.run():
        first.double.reload_delay_s = 1
        wish = first.wish(2)
        second.assemble()
        async with second.run():
            assert outcomes(await follow_change(first, wish)) == {FIRST: SwapOutcome.SUCCEEDED}


async def test_version_stays_desired_if_a_starting_server_cannot_serve_it_but_another_server_does(
    first: Control, second: Control
) -> None:
    make_version(first.registry, 4)
    make_version(second.registry, 4, probes_of="/elsewhere")
    async with first.run():
        await first.promote(4)
        second.assemble()
        await until(lambda: first.book.alias(NAME, Alias.PRODUCTION) == target(4).version)
        first.book.set_alias(target(1).version, Alias.PRODUCTION)  # as if MLflow had been away
        with pytest.raises(SvcError):
            await second.reconciler.start()
        assert first.desired().target == target(4)


async def test_promotion_waits_for_a_server_that_was_considered_dead_but_reports_again(
    both: tuple[Control, Control], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = both
    with monkeypatch.context() as patch:
        stop_reporting(second, patch)
        begin_serving(first.store, first.desired(), Began.START, server="other")

    async def awaited() -> set[str]:
        second.leadership._until = float("-inf")  # as if it had not reported for a long time
        await second.leadership.report()
        return {each.address for each in server_swaps(first.store, NAME, first.desired().generation + 1)}

    # A report that was under way sets the time again, so that one attempt may miss.
    assert any([await awaited() == {FIRST, SECOND} for _ in range(3)])


async def test_stopping_a_server_ends_only_its_own_service_period(first: Control, second: Control) -> None:
    async with first.run():
        async with second.run():
            await until(lambda: len(served_spans(first.store, NAME)) == 2)
            await second.deployment.close()
        spans = {span.server: span.ended_by for span in served_spans(first.store, NAME)}
        assert spans == {first.leadership.server: None, second.leadership.server: Ended.STOP}


async def test_unfinished_swap_of_a_dead_server_is_closed_when_another_server_starts(
    first: Control, second: Control
) -> None:
    change_desired(first.store, first.desired(), target(2), target(1))
    wish = first.desired()
    begin_swap(first.store, wish, server="died")
    second.assemble()
    async with second.run():
        await until(lambda: (swap := find_swap(first.store, NAME, server="died")) and swap.result)
        (died,) = server_swaps(first.store, NAME, wish.generation)
        assert died.swap and died.swap.result and not died.running
        assert died.swap.result.outcome is SwapOutcome.FAILED


async def test_held_out_evaluation_runs_on_one_server_and_moves_to_the_second_when_the_first_stops(
    first: Control, second: Control
) -> None:
    for server in (first, second):
        server.settings = server.settings.model_copy(update={"holdout": HoldoutSettings(requests_per_minute=1e6)})
        server.assemble()
    async with AsyncExitStack() as stack, second_after(first, second, stack):
        await until(lambda: len(runs(first.store)) == 1)
        await asyncio.sleep(0.2)
        assert len(runs(first.store)) == 1
        assert second.double.calls.count("/v1/chat/completions") == 0
        assert second.deployment.holdout.status(target(1))["state"] == "off"
        await stack.aclose()
        await second.leadership.report()
        await until(lambda: len(runs(first.store)) == 2)
        assert second.double.calls.count("/v1/chat/completions") == 3


@asynccontextmanager
async def second_after(first: Control, second: Control, stack: AsyncExitStack) -> AsyncIterator[None]:
    """Run both servers with their held-out evaluations. The first one stops when the stack is closed."""
    await stack.enter_async_context(first.run())
    async with second.run():
        tasks = [asyncio.create_task(server.deployment.holdout.run()) for server in (first, second)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


def runs(store: Store) -> list[int]:
    with Session(store) as session:
        return list(session.scalars(select(HoldoutRunRow.id)))


async def test_only_the_leader_writes_the_production_alias_until_it_stops(first: Control, second: Control) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(first.run())
        async with second.run():
            await until(lambda: first.book.book == {Alias.PRODUCTION: target(1).version})
            first.book.book.clear()
            await asyncio.sleep(0.1)
            assert first.book.book == {}
            await stack.aclose()
            await second.leadership.report()
            await until(lambda: first.book.book == {Alias.PRODUCTION: target(1).version})


async def test_server_list_shows_address_version_and_leases_of_each_server(both: tuple[Control, Control]) -> None:
    views = [(view.address, view.running, view.serves, view.leads) for view in server_views(both[0].store)]
    assert views == [(FIRST, True, (str(target(1)),), ("*", NAME)), (SECOND, True, (str(target(1)),), ())]
