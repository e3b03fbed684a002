"""Tests that a defect fails the swap: the previous version keeps serving, and unverified weights never do."""

from collections.abc import Callable
from typing import Any

import pytest

from serving.engines.replica import Replica
from serving.rollout.engine_change import EngineChange
from serving.rollout.swap import Swap
from serving.rollout.swap_plan import SwapPlanner
from svc.engine.state import EngineState
from svc.store.swaps import SwapOutcome
from tests.serving.control import Control, Make, ask, until
from tests.serving.engine_park import DoubleEngine
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow

ONE = f"{NAME}@1"
RELOAD = "/collective_rpc"


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, *calls: int) -> None:
    """Make the given calls of a coroutine function, counted from 1, raise an unexpected error."""
    work: Callable[..., Any] = getattr(owner, method)
    count = 0

    async def failing(*arguments: Any, **given: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            raise ZeroDivisionError(f"a defect in {method}")
        return await work(*arguments, **given)

    monkeypatch.setattr(owner, method, failing)


async def back_to_one(control: Control) -> None:
    """Wait until every member really serves version 1 and no other version is desired."""
    await until(lambda: len(control.pool.ready) == control.replicas and not control.pool.others)
    assert {engine.target for engine in control.pool.members} == {target(1)}
    assert {engine.double.weights.split("/")[-2] for engine in control.park.engines if engine.alive} == {"1"}
    assert control.desired().target == target(1)
    async with control.client() as client:
        assert (await ask(client, stream=False)).version == ONE


@pytest.mark.parametrize(("owner", "method"), [(SwapPlanner, "plan"), (Replica, "drained"), (Swap, "run")])
async def test_engine_keeps_serving_when_a_swap_fails_unexpectedly_before_the_reload(
    control: Control, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    fail_at(monkeypatch, owner, method, 1)
    swap = await control.promote(2)
    assert (swap.outcome, swap.reason) == (SwapOutcome.FAILED, f"ZeroDivisionError('a defect in {method}')")
    await back_to_one(control)
    assert len(control.park.engines) == 1
    assert control.reconciler.last_error == swap.reason
    assert control.sample("svc_swaps_total", model=NAME, outcome="failed") == 1
    assert (await control.promote(2)).outcome is SwapOutcome.SUCCEEDED


@pytest.mark.parametrize("method", ["_reload", "_restore"])
async def test_engine_is_replaced_after_an_unexpected_error_during_the_reload(
    control: Control, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    make_version(control.registry, 4, probes_of="/elsewhere")
    fail_at(monkeypatch, EngineChange, method, 1)
    swap = await control.promote(4)
    assert (swap.outcome, swap.reason) == (SwapOutcome.FAILED, f"ZeroDivisionError('a defect in {method}')")
    await back_to_one(control)
    assert len(control.park.engines) == 2


async def test_first_engine_is_restored_when_switching_the_second_engine_fails(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = make(replicas=2)
    async with control.run():
        await until(lambda: len(control.pool.ready) == 2)
        fail_at(monkeypatch, EngineChange, "_reload", 2)
        assert (await control.promote(2)).outcome is SwapOutcome.FAILED
        await back_to_one(control)


@pytest.mark.parametrize("method", ["run", "_end_requests"])
async def test_engine_is_replaced_when_restoring_its_previous_version_fails(
    make: Make, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    control = make(replicas=2, drain_timeout_s=0.1)
    async with control.run():
        await until(lambda: len(control.pool.ready) == 2)
        if method == "run":
            fail_at(monkeypatch, EngineChange, "_reload", 2)
            fail_at(monkeypatch, EngineChange, "run", 3)
        else:
            make_version(control.registry, 4, width=8)
            await _refuse_the_way_back(control, monkeypatch)
            fail_at(monkeypatch, EngineChange, "_end_requests", 1)
        assert (await control.promote(2)).outcome is SwapOutcome.FAILED
        await back_to_one(control)


async def _refuse_the_way_back(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the second change fail with a defect, and reject the third change, which restores the version."""
    change, count = EngineChange.run, 0

    async def run(self: EngineChange, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise ZeroDivisionError("a defect")
        return (SwapOutcome.REFUSED, "no room") if count == 3 else await change(self, *arguments)

    monkeypatch.setattr(EngineChange, "run", run)


async def test_engine_that_failed_to_start_is_stopped_even_if_the_first_attempts_to_stop_it_fail(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engines.retirement._RETRY_S", 0.05)
    control = make()
    make_version(control.registry, 4, width=8)
    async with control.run():
        control.park.failing_starts = 1
        fail_at(monkeypatch, DoubleEngine, "stop", 1, 2)
        assert (await control.promote(4)).outcome is SwapOutcome.REFUSED
        await back_to_one(control)


async def test_engine_is_replaced_after_an_unexpected_error_while_stopping_it(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, DoubleEngine, "stop", 1)
    async with control.pool.held(control.replica):
        with pytest.raises(ZeroDivisionError):
            await control.replica.start(target(1))
    await until(lambda: len(control.park.engines) == 2 and control.state is EngineState.READY)
