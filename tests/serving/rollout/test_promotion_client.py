"""Tests promotion as seen by its client: it returns, and with the true result."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy.exc import OperationalError

from serving.rollout.local_client import LocalAdministration
from serving.rollout.promotion import PromotionRequest, VersionChange
from serving.rollout.promotion_client import follow, read_served
from svc.errors import BusyError, NotFoundError, ServerNotRunningError
from svc.files.lock import hold_lock
from svc.remote.server_url import LOCK_FILE, server_address
from svc.store.desired import Desired, change_desired, read_desired
from svc.store.swaps import SwapKind, SwapOutcome, SwapResult, begin_swap, end_swap, find_swap
from svc.version import Format, Target, VersionId
from tests.serving.control import until
from tests.serving.home import Home
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow


def wish(home: Home, number: int) -> VersionChange:
    return LocalAdministration.of(home.settings).promote(PromotionRequest(target(number).version))


def follow_in(home: Home, change: VersionChange, steps: list[str] | None = None) -> SwapResult:
    return follow(LocalAdministration.of(home.settings), change, (steps if steps is not None else []).append).result


async def change(home: Home, number: int, steps: list[str] | None = None) -> SwapResult:
    return await asyncio.to_thread(lambda: follow_in(home, wish(home, number), steps))


async def test_promotion_returns_once_the_version_is_served(serving: Home) -> None:
    swap = await change(serving, 2)
    assert swap.outcome is SwapOutcome.SUCCEEDED
    served = await asyncio.to_thread(read_served, server_address(serving.settings))
    assert served == {NAME: target(2)}


async def test_each_promotion_step_is_reported_once(serving: Home) -> None:
    steps = list[str]()
    await change(serving, 2, steps)
    swap = find_swap(serving.store, NAME)
    assert swap is not None
    assert tuple(steps) == swap.steps
    assert len(steps) == len(set(steps)) > 4


async def test_promotion_without_a_running_server_changes_nothing(home: Home) -> None:
    with pytest.raises(ServerNotRunningError):
        LocalAdministration.of(home.settings)


async def test_rollback_of_an_unserved_model_is_rejected(serving: Home) -> None:
    """Rejected even if the name was served before, because no server would carry out the promotion."""
    make_version(serving.registry, 1, name="other")
    change_desired(serving.store, None, Target(VersionId("other", 1), Format.MERGED), None)
    made = LocalAdministration.of(serving.settings)
    with pytest.raises(NotFoundError, match="'other' is not served"):
        await asyncio.to_thread(made.rollback, "other", reason=None)


async def test_second_of_two_concurrent_promotions_is_rejected(serving: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(2)
    read = read_desired

    def read_together(store: Store, name: str) -> Desired | None:
        desired = read(store, name)
        barrier.wait(5)
        return desired

    monkeypatch.setattr("serving.rollout.version_changes.read_desired", read_together)
    results = await asyncio.gather(*(change(serving, number) for number in (2, 3)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["BusyError", "SwapResult"]


async def test_promotion_fails_if_superseded_before_the_server_reads_it(home: Home) -> None:
    """The server saw only the newer promotion."""
    seen = change_desired(home.store, None, target(1), None)
    begin_swap(home.store, Desired(target(3), target(2), seen.generation + 2))
    asked = VersionChange(target(2), target(1), seen.generation + 1)
    lock = hold_lock(home.settings.home / LOCK_FILE, "the home", url="http://127.0.0.1:9")
    with lock, pytest.raises(BusyError, match=r"tuned@3 \(merged\) was promoted before"):
        follow_in(home, asked)


async def test_promotion_fails_if_the_server_stops(home: Home) -> None:
    async with home.serving(f"{NAME}@1") as _:
        home.park.double.reload_delay_s = 10
        following = asyncio.create_task(change(home, 2))
        await until(lambda: "/collective_rpc" in home.park.double.calls)
    with pytest.raises(ServerNotRunningError, match=r"stopped before tuned@2"):
        await following
    desired = read_desired(home.store, NAME)
    assert desired is not None and desired.target == target(2)


async def test_promotion_fails_if_the_server_does_not_respond(home: Home) -> None:
    change_desired(home.store, None, target(1), None)
    lock = hold_lock(home.settings.home / LOCK_FILE, "the home", url="http://127.0.0.1:9")
    with lock, pytest.raises(ServerNotRunningError, match="is not responding"):
        wish(home, 2)


@pytest.fixture
def unwritten(serving: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """Yield a server that begins swaps but cannot write their results."""

    def fail(*_: object) -> None:
        raise OperationalError("update", {}, Exception("disk is full"))

    monkeypatch.setattr("serving.rollout.promotion_client._UNWRITTEN_S", 0.05)
    for pause in ("_PAUSE_S", "_MAX_PAUSE_S"):
        monkeypatch.setattr(f"serving.rollout.journal.{pause}", 0.01)
    with monkeypatch.context() as broken:
        broken.setattr("serving.rollout.journal.end_swap", fail)
        yield serving


async def test_swap_result_is_reported_even_if_the_server_cannot_write_it_to_its_journal(unwritten: Home) -> None:
    steps = list[str]()
    swap = await change(unwritten, 2, steps)
    assert (swap.outcome, swap.kind) == (SwapOutcome.SUCCEEDED, SwapKind.INPLACE)
    assert "could not write the result to its journal" in steps[-1]
    assert find_swap(unwritten.store, NAME, 2).result is None  # type: ignore[union-attr]


async def test_swap_refusal_is_reported_even_if_writing_it_to_the_journal_fails(unwritten: Home) -> None:
    make_version(unwritten.registry, 4, width=8)
    unwritten.park.room = "full"
    swap = await change(unwritten, 4)
    assert swap.outcome is SwapOutcome.REFUSED
    assert swap.reason is not None and "not enough memory for a second engine: full" in swap.reason


async def test_promotion_waits_for_a_long_swap(serving: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.rollout.promotion_client._UNWRITTEN_S", 0.01)
    serving.park.double.reload_delay_s = 0.3
    steps = list[str]()
    assert (await change(serving, 2, steps)).outcome is SwapOutcome.SUCCEEDED
    assert not any("journal" in step for step in steps[:-1])


async def test_reason_for_a_refused_swap_is_reported(serving: Home) -> None:
    make_version(serving.registry, 4, width=8)
    serving.park.room = "full"
    swap = await change(serving, 4)
    assert swap.outcome is SwapOutcome.REFUSED
    assert swap.reason is not None and "not enough memory for a second engine: full" in swap.reason


async def test_swap_result_is_returned_if_the_swap_ended_before_the_first_poll(home: Home) -> None:
    """The swap is already finished when the client checks for the first time."""
    change_desired(home.store, None, target(1), None)
    wanted = Desired(target(2), target(1), 2)
    end_swap(home.store, begin_swap(home.store, wanted), SwapResult(SwapOutcome.SUCCEEDED))
    with hold_lock(home.settings.home / LOCK_FILE, "the home", url="http://127.0.0.1:9"):
        asked = VersionChange(target(2), target(1), wanted.generation)
        assert follow_in(home, asked).outcome is SwapOutcome.SUCCEEDED
