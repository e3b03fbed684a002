"""Tests that a second engine replaces the first without any request waiting or anything being left behind."""

import asyncio

import pytest

from svc.engine.state import EngineState
from svc.settings.serve import SwapChoice
from svc.store.swaps import SwapKind, SwapOutcome
from svc.version import Format
from tests.serving.control import Control, Load, Make, ask, until
from tests.serving.engine_double import EngineDouble
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow

ONE, TWO, FOUR = f"{NAME}@1", f"{NAME}@2", f"{NAME}@4"
RELOAD = "/collective_rpc"


def slow(double: EngineDouble) -> None:
    double.token_delay_s = 0.01


@pytest.fixture
def control(make: Make) -> Control:
    """Return a server whose version 4 has a different shape, so that it cannot be loaded in place."""
    control = make()
    control.park.prepare = slow
    control.park.start_delay_s = 0.05
    make_version(control.registry, 4, width=8)
    return control


async def test_requests_during_a_blue_green_swap_succeed_without_waiting_and_never_mix_versions(
    control: Control,
) -> None:
    async with control.run(), control.client() as client:
        load = Load(client)
        async with load.run():
            await until(lambda: load.versions[ONE] > 12)
            swap = await control.promote(4)
            await until(lambda: load.versions[FOUR] > 12)
        await until(lambda: control.park.alive == 1)
    load.check()
    assert (swap.outcome, swap.kind, swap.queued, swap.queued_s) == (
        SwapOutcome.SUCCEEDED,
        SwapKind.BLUEGREEN,
        None,
        None,
    )
    assert swap.took_s is not None and swap.took_s >= 0.05
    assert set(load.versions) == {ONE, FOUR}
    assert not any(RELOAD in engine.double.calls for engine in control.park.engines)


async def test_requests_are_answered_while_the_second_engine_starts(control: Control) -> None:
    async with control.run(), control.client() as client:
        control.park.start_delay_s = 0.3
        wish = control.wish(4)
        await until(lambda: len(control.park.engines) == 2)
        assert (await ask(client, stream=True)).version == ONE
        assert control.sample("svc_engine_state", model=NAME, state="starting") == 1
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED


async def test_swap_to_a_different_format_uses_a_second_engine(control: Control) -> None:
    make_version(control.registry, 5, formats=(Format.MERGED, Format.GPTQ))
    async with control.run():
        await control.promote(5)
        swap = await control.reconciler.swap.run(target(5), target(5, Format.GPTQ), lambda step: None)
        assert (swap.outcome, swap.kind) == (SwapOutcome.SUCCEEDED, SwapKind.BLUEGREEN)


async def test_failed_stop_of_a_replaced_engine_is_retried(
    control: Control, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.engines.retirement._RETRY_S", 0.01)
    async with control.run():
        (old,) = control.park.engines
        stop, faults = old.stop, [OSError("busy")]

        async def stop_at_second_try() -> None:
            if faults:
                raise faults.pop()
            await stop()

        monkeypatch.setattr(old, "stop", stop_at_second_try)
        await control.promote(4)
        await until(lambda: control.pool.all == control.pool.members)
        assert not old.alive
    assert "could not stop replica 0" in caplog.text


async def test_blue_green_swap_is_used_for_every_version_if_configured(make: Make) -> None:
    async with make(swap=SwapChoice.BLUEGREEN).run() as control:
        assert (await control.promote(2)).kind is SwapKind.BLUEGREEN
        await control.serves(target(2))
        assert RELOAD not in control.park.engines[0].double.calls


async def test_answer_longer_than_the_drain_timeout_completes_without_delaying_the_swap(make: Make) -> None:
    control = make(drain_timeout_s=0.1)
    control.park.prepare = lambda double: setattr(double, "token_delay_s", 0.0 if control.park.engines else 0.15)
    async with control.run(), control.client() as client:
        long = asyncio.create_task(ask(client, stream=True))
        await until(lambda: control.double.running)
        wish = control.wish(2)
        await until(lambda: control.admission._closed)
        queued = asyncio.create_task(ask(client, stream=False))
        swap = await control.outcome(wish)
        assert (await ask(client, stream=True)).version == TWO
        assert not long.done()
        assert (await long).words == {"1"}
        assert (await queued).status == 200
        await until(lambda: control.park.alive == 1)
    assert (swap.outcome, swap.kind, swap.queued) == (SwapOutcome.SUCCEEDED, SwapKind.BLUEGREEN, 1)
    assert any("still running" in step for step in control.steps)


async def test_weights_that_fail_verification_never_serve_a_request(control: Control) -> None:
    make_version(control.registry, 5, width=8, probes_of="/elsewhere")
    async with control.run(), control.client() as client:
        load = Load(client)
        async with load.run():
            await until(lambda: load.answers)
            swap = await control.promote(5)
            answered = len(load.answers)
            await until(lambda: len(load.answers) > answered + 9)
        assert control.park.alive == 1
        assert control.desired().target == target(1)
    load.check()
    assert set(load.versions) == {ONE}
    assert swap.outcome is SwapOutcome.REFUSED
    assert swap.reason is not None and "not the version's weights" in swap.reason


async def test_serving_engine_is_unchanged_if_the_second_engine_fails_to_start(control: Control) -> None:
    async with control.run(), control.client() as client:
        control.park.failing_starts = 1
        swap = await control.promote(4)
        assert (await ask(client, stream=True)).version == ONE
        assert (control.park.alive, control.pool.restarts) == (1, 0)
    assert swap.outcome is SwapOutcome.REFUSED
    assert swap.reason is not None and "no memory" in swap.reason


async def test_swap_succeeds_if_the_serving_engine_dies_while_the_second_engine_starts(control: Control) -> None:
    async with control.run(), control.client() as client:
        control.park.start_delay_s = 0.2
        wish = control.wish(4)
        await until(lambda: len(control.park.engines) == 2)
        control.park.engines[0].kill()
        await until(lambda: control.state is EngineState.FAILED)
        assert (await ask(client, stream=False)).error == "engine_unavailable"
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED
        assert (await ask(client, stream=False)).version == FOUR


async def test_previous_version_is_served_again_after_both_engines_die(control: Control) -> None:
    async with control.run():
        control.park.start_delay_s, control.park.failing_starts = 0.2, 1
        wish = control.wish(4)
        await until(lambda: len(control.park.engines) == 2)
        control.park.engines[0].kill()
        assert (await control.outcome(wish)).outcome is SwapOutcome.REFUSED
        await control.serves(target(1))


async def test_replaced_engine_is_stopped_after_a_timeout_even_with_running_requests(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engines.retirement.RETIRE_TIMEOUT_S", 0.1)
    control = make(swap=SwapChoice.BLUEGREEN)
    async with control.run(), control.client() as client:
        control.double.token_delay_s = 60
        endless = asyncio.create_task(ask(client, stream=True))
        await until(lambda: control.double.running)
        await control.promote(2)
        assert (await endless).error == "engine_died"
        await until(lambda: control.park.alive == 1)
        assert control.sample("svc_engine_state", model=NAME, state="retiring") == 0


async def test_swap_waits_until_a_replaced_engine_finishes_answering_and_frees_its_memory(make: Make) -> None:
    control = make(swap=SwapChoice.BLUEGREEN)
    async with control.run(), control.client() as client:
        control.double.token_delay_s = 0.1
        long = asyncio.create_task(ask(client, stream=True))
        await until(lambda: control.double.running)
        await control.promote(2)
        first = control.park.engines[0]
        assert first.alive
        control.park.shortage = lambda more: "full" if first.alive else None
        assert (await control.promote(3)).outcome is SwapOutcome.SUCCEEDED
        assert (await long).words == {"1"}


async def test_replica_indices_of_stopped_engines_are_reused(make: Make) -> None:
    async with make(swap=SwapChoice.BLUEGREEN).run() as control:
        replicas = []
        for number in (2, 3, 2):
            await control.promote(number)
            await until(lambda: control.park.alive == 1)
            replicas.append(control.replica.replica)
        assert replicas == [1, 0, 1]


async def test_no_engine_keeps_running_if_the_server_stops_during_a_swap(control: Control) -> None:
    async with control.run():
        control.park.start_delay_s = 10
        control.wish(4)
        await until(lambda: control.park.alive == 2)
