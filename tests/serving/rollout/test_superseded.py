"""Tests a swap during which another version becomes desired: it stops early with the previous version."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from sqlalchemy.exc import OperationalError

from serving.rollout import reconciler
from svc.engine.state import EngineState
from svc.settings.serve import SwapChoice
from svc.store.desired import Desired, read_desired
from svc.store.swaps import SwapKind, SwapOutcome, SwapResult, find_swap
from svc.version import Target
from tests.serving.control import Control, Load, Make, ask, until
from tests.serving.engine_double import EngineDouble
from tests.serving.engine_park import DoubleEngine
from tests.serving.versions import NAME, OTHER_FACTS, make_version, target

pytestmark = pytest.mark.slow

ONE, TWO = f"{NAME}@1", f"{NAME}@2"
RELOAD, RESET, PROBE = "/collective_rpc", "/reset_prefix_cache", "/v1/completions"
LONG_S = 30.0
WITHIN_S = 2.0


def slow(double: EngineDouble) -> None:
    double.token_delay_s, double.reload_delay_s = 0.01, 0.3


@pytest.fixture
def control(make: Make) -> Control:
    """Return a server with one engine whose versions 4 and 5 cannot be loaded in place of any other version."""
    control = make()
    control.park.prepare = slow
    make_version(control.registry, 4, width=8)
    make_version(control.registry, 5, width=16)
    return control


@asynccontextmanager
async def loaded(control: Control) -> AsyncIterator[tuple[httpx.AsyncClient, Load]]:
    """Yield a server under load from clients whose requests must not fail."""
    async with control.run(), control.client() as client:
        await until(lambda: len(control.pool.ready) == control.replicas)
        load = Load(client)
        async with load.run():
            await until(lambda: load.answers)
            yield client, load
            answered = len(load.answers)
            await until(lambda: len(load.answers) > answered + 9)
        load.check()
        await alone(control)


async def alone(control: Control) -> None:
    """Wait until only the members are running and admission is open."""
    await until(lambda: control.pool.all == control.pool.members and control.park.alive == control.replicas)
    assert len(control.pool.ready) == control.replicas
    assert control.admission.unavailable_reason is None and not control.admission._closed


def weights(control: Control) -> list[str]:
    """Return the weights that each engine actually holds."""
    return [engine.double.weights.split("/")[-2] for engine in control.park.engines if engine.alive]


async def roll_back(control: Control, promotion: Desired) -> tuple[SwapResult, float]:
    """Roll back to version 1. Return how the promotion ended, and after how many seconds the rollback was done."""
    began = time.monotonic()
    back = control.wish(1)
    assert (await control.outcome(back)).outcome is SwapOutcome.SUCCEEDED
    took_s = time.monotonic() - began
    print(f"rolled back in {took_s:.3f} s")  # for `pytest -rP`
    await until(lambda: control.desired().previous is None)
    assert control.desired().target == control.reconciler.actual.target == target(1)
    assert control.names.served == target(1)
    return await control.outcome(promotion), took_s


def steps(control: Control, wish: Desired) -> tuple[str, ...]:
    swap = find_swap(control.store, NAME, wish.generation)
    return swap.steps if swap else ()


def assert_cancelled(swap: SwapResult, number: int = 1) -> None:
    assert (swap.outcome, swap.reason) == (SwapOutcome.CANCELLED, f"superseded by {target(number)}")


async def test_swap_is_cancelled_if_superseded_while_the_second_engine_starts(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses the real interval between reads of the store, and an engine that takes a while to stop."""
    monkeypatch.setattr("serving.rollout.reconciler._POLL_S", 0.25)
    stop = DoubleEngine.stop

    async def stop_slowly(engine: DoubleEngine) -> None:
        await asyncio.sleep(1.0)
        await stop(engine)

    async with loaded(control):
        control.park.start_delay_s = LONG_S
        promotion = control.wish(4)
        await until(lambda: control.park.alive == 2)
        with monkeypatch.context() as slowly:
            slowly.setattr(DoubleEngine, "stop", stop_slowly)
            swap, took_s = await roll_back(control, promotion)
            assert control.park.alive == 2  # the swap does not wait until it is stopped
            await until(lambda: control.park.alive == 1)
        assert_cancelled(swap)
        assert swap.kind is SwapKind.BLUEGREEN
        assert took_s < WITHIN_S
        assert control.state is EngineState.READY
        assert control.sample("svc_swaps_total", model=NAME, outcome="cancelled") == 1
        assert control.reconciler.last_error is None
        assert swap.queued_s is None
    assert len(control.park.engines) == 2


async def test_swap_is_cancelled_if_superseded_before_any_engine_is_changed(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = threading.Event()
    verify = control.registry.verify

    def verify_slowly(*version: object) -> None:
        hashed.wait(10)
        verify(*version)  # type: ignore[arg-type]

    async with loaded(control):
        monkeypatch.setattr(control.registry, "verify", verify_slowly)
        promotion = control.wish(2)
        await until(lambda: control.steps)
        swap, took_s = await roll_back(control, promotion)
        hashed.set()
    assert_cancelled(swap)
    assert took_s < WITHIN_S
    assert RELOAD not in control.double.calls


async def test_swap_is_cancelled_if_superseded_while_waiting_for_memory(make: Make) -> None:
    control = make(swap=SwapChoice.BLUEGREEN)
    async with control.run(), control.client() as client:
        control.double.token_delay_s = 0.5
        long = asyncio.create_task(ask(client, stream=True))
        await until(lambda: control.double.running)
        await control.promote(2)  # the first engine stays for its last request
        control.park.room = "full"
        promotion = control.wish(3)
        await until(lambda: any("bluegreen" in step for step in steps(control, promotion)))
        began = time.monotonic()
        assert (await control.promote(2)).outcome is SwapOutcome.SUCCEEDED
        assert time.monotonic() - began < 0.5
        assert_cancelled(await control.outcome(promotion), 2)
        assert (await long).status == 200


async def test_swap_is_cancelled_if_superseded_while_requests_drain(make: Make) -> None:
    control = make()
    async with control.run(), control.client() as client:
        control.double.token_delay_s = 0.3
        running = asyncio.create_task(ask(client, stream=True))
        await until(lambda: control.double.running)
        promotion = control.wish(2)
        await until(lambda: control.state is EngineState.DRAINING)
        queued = asyncio.create_task(ask(client, stream=False))
        await until(lambda: control.admission.queued)
        swap, took_s = await roll_back(control, promotion)
        assert not running.done()
        assert [(await task).words for task in (running, queued)] == [{"1"}, {"1"}]
        await alone(control)
    assert_cancelled(swap)
    assert took_s < WITHIN_S
    assert swap.queued == 1
    assert RELOAD not in control.double.calls


async def test_swap_is_cancelled_if_superseded_while_an_abandoned_request_drains(control: Control) -> None:
    async with control.run():
        control.double.stuck_resets = 1000
        promotion = control.wish(2)
        await until(lambda: RESET in control.double.calls)
        swap, took_s = await roll_back(control, promotion)
        control.double.stuck_resets = 0
        await alone(control)
        assert (await control.promote(2)).outcome is SwapOutcome.SUCCEEDED
    assert_cancelled(swap)
    assert took_s < WITHIN_S


async def test_rollback_during_a_reload_reloads_the_previous_version_into_the_same_engine(control: Control) -> None:
    async with loaded(control):
        promotion = control.wish(2)
        await until(lambda: control.state is EngineState.SWAPPING)
        probes = control.double.calls.count(PROBE)
        swap, took_s = await roll_back(control, promotion)
        assert control.double.calls.count(RELOAD) == 2
        assert control.double.calls.count(PROBE) == probes + 1
        assert weights(control) == ["1"]
    assert_cancelled(swap)
    assert took_s < WITHIN_S
    assert len(control.park.engines) == 1
    assert any("weights of tuned@1" in step for step in steps(control, promotion))


async def test_swap_is_undone_if_superseded_while_the_loaded_weights_are_verified(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is checked right after the reload, so the version passes its probes and is undone nevertheless."""
    async with loaded(control):
        verify, verified = control.replica.verify, asyncio.Event()

        async def verify_slowly(version: Target) -> str:
            checked = await verify(version)
            verified.set()
            await asyncio.sleep(0.1)
            return checked

        monkeypatch.setattr(control.replica, "verify", verify_slowly)
        promotion = control.wish(2)
        await verified.wait()
        swap, took_s = await roll_back(control, promotion)
        assert weights(control) == ["1"]
    assert_cancelled(swap)
    assert took_s < WITHIN_S


async def test_engine_that_cannot_return_to_the_previous_version_is_replaced(control: Control) -> None:
    async with loaded(control):
        promotion = control.wish(2)
        await until(lambda: control.state is EngineState.SWAPPING)
        control.double.loadable = lambda folder: "/1/" not in folder
        swap, _ = await roll_back(control, promotion)
        assert weights(control) == ["1"]
    assert (swap.outcome, swap.reason) == (SwapOutcome.FAILED, f"superseded by {target(1)}")
    assert len(control.park.engines) == 2


@pytest.mark.parametrize("state", [EngineState.DRAINING, EngineState.SWAPPING])
async def test_switched_engines_are_restored_if_the_swap_is_superseded(make: Make, state: EngineState) -> None:
    control = make(replicas=3)
    control.park.prepare = slow
    async with loaded(control):
        second = control.pool.members[1]
        promotion = control.wish(2)
        await until(lambda: control.pool.members[0].target == target(2))
        await until(lambda: second.state is state)
        swap, took_s = await roll_back(control, promotion)
        assert weights(control) == ["1"] * 3
        assert control.names.all() == (NAME, ONE, f"{NAME}@production")
    assert_cancelled(swap)
    assert swap.kind is SwapKind.ROLLING
    assert took_s < WITHIN_S
    assert len(control.park.engines) == 3


async def test_first_engine_is_restored_if_a_swap_is_superseded_while_replacing_the_second(
    make: Make,
) -> None:
    control = make(replicas=2, swap=SwapChoice.BLUEGREEN)
    async with loaded(control):
        control.park.prepare = lambda double: setattr(control.park, "start_delay_s", 0.2 if changed() else 0.0)

        def changed() -> bool:
            return any(member.target == target(2) for member in control.pool.members)

        promotion = control.wish(2)
        await until(changed)
        await until(lambda: control.park.starting)
        swap, took_s = await roll_back(control, promotion)
        await alone(control)
        assert weights(control) == ["1", "1"]
    assert_cancelled(swap)
    assert took_s < WITHIN_S


@pytest.fixture
def cramped(make: Make) -> Control:
    """Return a server without memory for a second engine, whose versions require an engine start."""
    control = make(facts=OTHER_FACTS)
    control.park.prepare = slow
    control.park.room = "full"
    return control


async def test_previous_version_is_loaded_if_a_swap_is_superseded_while_the_only_engine_restarts(
    cramped: Control,
) -> None:
    control = cramped
    async with loaded(control):
        control.park.start_delay_s = LONG_S
        promotion = control.wish(2)
        await until(lambda: control.state is EngineState.STARTING and control.park.starting)
        control.park.start_delay_s = 0.1
        swap, _ = await roll_back(control, promotion)
        assert weights(control) == ["1"]
    assert_cancelled(swap)


async def test_both_engines_serve_the_previous_version_if_a_swap_is_superseded_while_one_of_them_restarts(
    make: Make,
) -> None:
    control = make(facts=OTHER_FACTS, replicas=2)
    control.park.room = "full"
    async with loaded(control):
        control.park.start_delay_s = LONG_S
        promotion = control.wish(2)
        await until(lambda: control.park.starting)
        control.park.start_delay_s = 0.1
        swap, took_s = await roll_back(control, promotion)
        await until(lambda: len(control.pool.ready) == 2)
        assert weights(control) == ["1", "1"]
    assert_cancelled(swap)
    assert took_s < WITHIN_S


async def test_swap_to_a_third_version_supersedes_a_running_swap_and_succeeds(control: Control) -> None:
    async with loaded(control) as (_, load):
        control.park.start_delay_s = LONG_S
        promotion = control.wish(4)
        await until(lambda: control.park.alive == 2)
        assert (await control.promote(3)).outcome is SwapOutcome.SUCCEEDED
        assert_cancelled(await control.outcome(promotion), 3)
        await until(lambda: control.desired().previous == target(1))
        await until(lambda: load.versions[f"{NAME}@3"] > 9)
        assert set(load.versions) == {ONE, f"{NAME}@3"}


async def test_previous_version_serves_after_two_promotions_and_a_rollback(control: Control) -> None:
    async with loaded(control) as (_, load):
        control.park.start_delay_s = LONG_S
        first = control.wish(4)
        await until(lambda: len(control.park.engines) == 2)
        second = control.wish(5)
        await until(lambda: len(control.park.engines) == 3)
        swap, took_s = await roll_back(control, second)
        assert_cancelled(await control.outcome(first), 5)
        assert set(load.versions) == {ONE}
    assert_cancelled(swap)
    assert took_s < WITHIN_S


async def test_rollback_is_carried_out_even_if_the_swap_was_already_superseded(control: Control) -> None:
    """Version 1 becomes desired again while the previous version is being restored for version 3."""
    async with loaded(control):
        promotion = control.wish(2)
        await until(lambda: control.state is EngineState.SWAPPING)
        control.wish(3)
        await until(lambda: control.double.calls.count(RELOAD) == 2)
        swap, _ = await roll_back(control, promotion)
        assert weights(control) == ["1"]
    assert_cancelled(swap, 3)


async def test_swap_continues_if_the_same_version_is_promoted_again(control: Control) -> None:
    async with loaded(control):
        control.park.start_delay_s = 0.3
        promotion = control.wish(4)
        await until(lambda: control.park.alive == 2)
        again = control.wish(4)
        assert (await control.outcome(promotion)).outcome is SwapOutcome.SUCCEEDED
        assert (await control.outcome(again)).outcome is SwapOutcome.SUCCEEDED
        await until(lambda: control.desired().previous == target(1))
    assert len(control.park.engines) == 2


async def test_superseded_engine_start_is_cancelled_if_no_engine_is_serving(control: Control) -> None:
    async with control.run():
        control.park.start_delay_s = LONG_S
        control.reconciler.reviver.backoff_s = (60.0,)
        control.park.engines[0].kill()
        await until(lambda: control.state is EngineState.FAILED)
        promotion = control.wish(2)
        await until(lambda: control.park.starting)
        control.park.start_delay_s = 0.0
        swap, _ = await roll_back(control, promotion)
        await control.serves(target(1))
        assert weights(control) == ["1"]
        await alone(control)
    assert_cancelled(swap)


async def test_superseded_swap_is_cancelled_even_if_the_serving_engine_dies(control: Control) -> None:
    async with control.run(), control.client() as client:
        control.park.start_delay_s = LONG_S
        promotion = control.wish(4)
        await until(lambda: control.park.alive == 2)
        control.park.start_delay_s = 0.0
        control.park.engines[0].kill()
        swap, _ = await roll_back(control, promotion)
        await control.serves(target(1))
        assert (await ask(client, stream=True)).words == {"1"}
        await alone(control)
    assert_cancelled(swap)


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_previous_version_is_restored_if_an_engine_dies_in_a_superseded_swap(make: Make, victim: int) -> None:
    """Covers an engine that was changed, one that is being changed, and one that was not changed."""
    control = make(replicas=3)
    control.park.prepare = slow
    async with control.run():
        await until(lambda: len(control.pool.ready) == 3)
        promotion = control.wish(2)
        await until(lambda: control.pool.members[1].state is EngineState.SWAPPING)
        replica = control.pool.members[victim].replica
        next(engine for engine in control.park.engines if engine.replica == replica).kill()
        swap, _ = await roll_back(control, promotion)
        await until(lambda: len(control.pool.ready) == 3)
        assert weights(control) == ["1"] * 3
        await alone(control)
    assert swap.outcome in (SwapOutcome.CANCELLED, SwapOutcome.FAILED)


async def test_no_engine_keeps_running_if_the_server_stops_after_a_superseded_swap(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = DoubleEngine.stop

    async def stop_slowly(engine: DoubleEngine) -> None:
        await asyncio.sleep(0.3)
        await stop(engine)

    monkeypatch.setattr(DoubleEngine, "stop", stop_slowly)
    async with control.run():
        control.park.start_delay_s = LONG_S
        promotion = control.wish(4)
        await until(lambda: control.park.alive == 2)
        back = control.wish(1)
        await control.outcome(back)
        assert control.park.alive == 2
    assert control.park.alive == 0
    control.assemble()
    control.park.start_delay_s = 0.0
    async with control.run():
        await control.serves(target(1))
        assert_cancelled(await control.outcome(promotion))


async def test_restarted_server_serves_the_desired_version_after_interrupted_restoration(
    control: Control,
) -> None:
    async with control.run():
        promotion = control.wish(2)
        await until(lambda: control.state is EngineState.SWAPPING)
        control.wish(1)
        await until(lambda: control.double.calls.count(RELOAD) == 2)
    control.assemble()
    async with control.run():
        await control.serves(target(1))
        assert (await control.outcome(promotion)).outcome is SwapOutcome.FAILED
        assert weights(control) == ["1"]


async def test_swap_can_still_be_cancelled_after_a_store_outage(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = False

    def read_or_fail(*arguments: object) -> object:
        if away:
            raise OperationalError("select", {}, Exception("disk I/O error"))
        return read_desired(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reconciler, "read_desired", read_or_fail)
    async with loaded(control):
        control.park.start_delay_s = LONG_S
        promotion = control.wish(4)
        await until(lambda: control.park.alive == 2)
        away = True
        await asyncio.sleep(0.05)
        away = False
        swap, took_s = await roll_back(control, promotion)
    assert_cancelled(swap)
    assert took_s < WITHIN_S
