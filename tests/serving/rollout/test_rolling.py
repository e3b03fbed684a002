"""Tests changing several engines one after the other while the rest answer, when any of them may die."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from svc.engine.state import EngineState
from svc.settings.serve import SwapChoice
from svc.store.desired import Desired
from svc.store.swaps import SwapKind, SwapOutcome
from svc.version import Target
from tests.serving.control import BODY, Control, Load, Make, ask, until
from tests.serving.engine_double import EngineDouble
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow

ONE, TWO = f"{NAME}@1", f"{NAME}@2"
RELOAD = "/collective_rpc"


def slow(double: EngineDouble) -> None:
    double.token_delay_s, double.reload_delay_s = 0.01, 0.05


@pytest.fixture
def control(make: Make) -> Control:
    """Return a server with two engines."""
    control = make(replicas=2)
    control.park.prepare = slow
    return control


async def both_ready(control: Control, number: int = 1) -> None:
    """Wait until both engines serve a version."""
    await until(
        lambda: len(control.pool.ready) == 2 and {engine.target for engine in control.pool.ready} == {target(number)}
    )


def weights(control: Control) -> list[str]:
    """Return the weights that each engine actually holds."""
    return [engine.double.weights.split("/")[-2] for engine in control.park.engines if engine.alive]


async def test_first_engine_serves_requests_before_the_second_has_started(control: Control) -> None:
    control.park.start_delay_s = 0.2
    async with control.run(), control.client() as client:
        assert (await ask(client, stream=True)).version == ONE
        assert len(control.pool.ready) == 1
        await both_ready(control)
        assert control.pool.restarts == 0


async def test_request_is_sent_to_the_second_engine_if_the_first_refuses_the_connection(control: Control) -> None:
    async with control.run(), control.client() as client:
        await both_ready(control)
        server = control.park.engines[0].server
        assert server is not None
        server.kill()  # and its death is not noticed yet
        answers = [await ask(client, stream=number % 2 == 0) for number in range(4)]
        assert {answer.status for answer in answers} == {200}


async def test_conversation_uses_the_second_engine_when_its_own_engine_is_busy(control: Control) -> None:
    async with control.run(), control.client() as client:
        await both_ready(control)
        answers = [asyncio.create_task(ask(client, stream=True)) for _ in range(6)]
        await until(lambda: sorted(engine.double.running for engine in control.park.engines) == [2, 4])
        await asyncio.gather(*answers)


async def test_engine_that_dies_unnoticed_during_a_rolling_swap_is_restarted_with_the_new_version(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engines.engine_watch._HEALTH_S", 60.0)
    async with control.run():
        await both_ready(control)
        wish = control.wish(2)
        await until(lambda: any(engine.state is EngineState.SWAPPING for engine in control.pool.members))
        (other,) = control.pool.ready
        next(double for double in control.park.engines if double.client is other.client).double.dead = True
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED
        await both_ready(control, 2)


async def test_requests_never_fail_or_wait_or_mix_versions_in_a_rolling_swap_under_load(control: Control) -> None:
    async with control.run(), control.client() as client:
        await both_ready(control)
        load = Load(client)
        async with load.run():
            await until(lambda: load.versions[ONE] > 12)
            swap = await control.promote(2)
            await until(lambda: load.versions[TWO] > 12)
        assert weights(control) == ["2", "2"]
    load.check()
    assert (swap.outcome, swap.kind) == (SwapOutcome.SUCCEEDED, SwapKind.ROLLING)
    assert (swap.queued, swap.queued_s) == (None, None)
    assert len(control.park.engines) == 2


async def test_both_versions_can_be_requested_by_number_during_a_swap(make: Make) -> None:
    control = make(replicas=3)
    async with control.run(), control.client() as client:
        await until(lambda: len(control.pool.ready) == 3)
        control.park.engines[1].double.reload_delay_s = 0.3
        wish = control.wish(2)
        await until(lambda: control.names.all() == (NAME, ONE, TWO, f"{NAME}@production"))
        for version in (ONE, TWO):
            answer = await client.post("/v1/chat/completions", json=BODY | {"model": version})
            assert answer.headers["x-model-version"] == version
        await control.outcome(wish)
        assert (await client.post("/v1/chat/completions", json=BODY | {"model": ONE})).status_code == 404


@pytest.mark.parametrize("bad", [0, 1], ids=["first", "second"])
async def test_all_engines_are_restored_if_verification_fails_on_one_engine(control: Control, bad: int) -> None:
    async with control.run(), control.client() as client:
        await both_ready(control)
        double = control.park.engines[bad].double
        double.on_call = lambda path: setattr(double, "probe_noise", 9.0 if "/2/" in double.weights else 0.0)
        load = Load(client)
        async with load.run():
            await until(lambda: load.answers)
            swap = await control.promote(2)
            await both_ready(control)
        assert weights(control) == ["1", "1"]
        assert control.desired().target == target(1)
        assert control.names.all() == (NAME, ONE, f"{NAME}@production")
    load.check()
    assert swap.outcome is SwapOutcome.RESTORED
    assert len(control.park.engines) == 2


async def test_both_engines_are_restored_if_a_reload_kills_the_second(control: Control) -> None:
    async with control.run():
        await both_ready(control)
        control.park.engines[1].double.loadable = lambda folder: "/2/" not in folder
        swap = await control.promote(2)
        await both_ready(control)
        assert weights(control) == ["1", "1"]
    assert swap.outcome is SwapOutcome.FAILED
    assert control.pool.restarts == 1


async def test_engine_death_fails_only_the_requests_running_on_it(control: Control) -> None:
    async with control.run(), control.client() as client:
        await both_ready(control)
        control.park.engines[0].kill()
        await until(lambda: len(control.pool.ready) == 1)
        answers = [await ask(client, stream=stream) for stream in (True, False) * 4]
        assert [answer.status for answer in answers] == [200] * 8
        assert control.admission.unavailable_reason is None
        await both_ready(control)
        assert control.pool.restarts == 1


async def test_engine_that_is_down_during_a_promotion_restarts_with_the_new_version(control: Control) -> None:
    async with control.run():
        await both_ready(control)
        control.reconciler.reviver.backoff_s = (0.3,)
        control.park.engines[0].kill()
        await until(lambda: len(control.pool.ready) == 1)
        assert (await control.promote(2)).outcome is SwapOutcome.SUCCEEDED
        await both_ready(control, 2)
        assert weights(control) == ["2", "2"]


async def test_already_switched_engine_that_dies_is_restarted_with_the_new_version(control: Control) -> None:
    async with control.run():
        await both_ready(control)
        control.park.engines[1].double.reload_delay_s = 0.2
        wish = control.wish(2)
        await until(lambda: control.pool.members[0].target == target(2))
        control.park.engines[0].kill()
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED
        await both_ready(control, 2)


@asynccontextmanager
async def last_one_changed(control: Control) -> AsyncIterator[tuple[httpx.AsyncClient, Desired]]:
    """Let the second engine die permanently while the first one loads version 2."""
    async with control.run(), control.client() as client:
        await both_ready(control)
        control.reconciler.reviver.backoff_s = (60.0,)
        control.park.engines[0].double.reload_delay_s = 0.3
        wish = control.wish(2)
        await until(lambda: control.pool.members[0].state is EngineState.SWAPPING)
        control.park.engines[1].kill()
        await until(lambda: control.pool.members[1].state is EngineState.FAILED)
        yield client, wish


async def test_requests_wait_for_the_engine_being_switched_if_the_only_serving_engine_dies(control: Control) -> None:
    async with last_one_changed(control) as (client, wish):
        answer = await ask(client, stream=False)
        assert (answer.status, answer.version) == (200, TWO)
        assert (await control.outcome(wish)).queued == 1


async def test_service_is_healthy_while_requests_wait_for_its_last_engine(control: Control) -> None:
    async with last_one_changed(control) as (client, _):
        assert (await client.get("/health")).status_code == 200
        assert control.admission._closed


async def test_requests_are_queued_while_the_last_engine_restarts(control: Control) -> None:
    async with last_one_changed(control) as (client, _):
        control.park.engines[0].double.loadable = lambda folder: "/2/" not in folder
        answer = await ask(client, stream=False)
        assert (answer.status, answer.version) == (200, ONE)


async def test_requests_wait_for_the_engine_being_switched_if_no_other_engine_is_alive(control: Control) -> None:
    async with control.run(), control.client() as client:
        await both_ready(control)
        control.reconciler.reviver.backoff_s = (60.0,)
        control.park.engines[1].kill()
        await until(lambda: control.pool.members[1].state is EngineState.FAILED)
        control.park.engines[0].double.reload_delay_s = 0.3
        control.wish(2)
        await until(lambda: control.pool.members[0].state is EngineState.SWAPPING)
        assert (await ask(client, stream=False)).version == TWO


async def test_requests_wait_at_most_the_drain_timeout_for_an_engine_to_be_restored(make: Make) -> None:
    """The second engine cannot be changed or replaced for lack of memory, and dies. Only the first is left."""
    control = make(replicas=2, drain_timeout_s=0.2)
    control.park.room = "full"
    async with control.run():
        await both_ready(control)
        control.reconciler.reviver.backoff_s = (60.0,)
        first, second = control.pool.members
        with second.occupied():
            wish = control.wish(2)
            await until(lambda: second.state is EngineState.DRAINING)
            with first.occupied():
                await until(lambda: any("restoring" in step for step in control.steps))
                control.park.engines[1].kill()
                assert (await control.outcome(wish)).outcome is SwapOutcome.RESTORED


async def test_each_engine_is_replaced_if_the_new_version_has_different_weight_shapes(control: Control) -> None:
    make_version(control.registry, 4, width=8)
    async with control.run(), control.client() as client:
        await both_ready(control)
        load = Load(client)
        async with load.run():
            await until(lambda: load.answers)
            swap = await control.promote(4)
            await until(lambda: load.versions[f"{NAME}@4"] > 9)
        await until(lambda: control.park.alive == 2)
    load.check()
    assert (swap.outcome, swap.kind) == (SwapOutcome.SUCCEEDED, SwapKind.BLUEGREEN)


async def test_previous_version_is_restored_if_the_second_new_engine_fails_to_start(make: Make) -> None:
    control = make(replicas=2, swap=SwapChoice.BLUEGREEN)
    async with control.run(), control.client() as client:
        await both_ready(control)
        control.park.prepare = lambda double: setattr(control.park, "failing_starts", len(control.park.engines) == 3)
        swap = await control.promote(2)
        await both_ready(control)
        assert weights(control).count("2") == 0
        assert (await ask(client, stream=False)).version == ONE
    assert swap.outcome is SwapOutcome.RESTORED


async def test_running_requests_are_answered_before_an_engine_is_restored(make: Make) -> None:
    """The second engine can be neither changed nor added to, so the first is replaced after draining."""
    control = make(replicas=2, drain_timeout_s=0.2)
    control.park.prepare = slow
    control.park.room = "full"
    async with control.run(), control.client() as client:
        await both_ready(control)
        for engine in control.park.engines:
            engine.double.token_delay_s = 0.2
        long = [asyncio.create_task(ask(client, stream=True))]
        await until(lambda: control.pool.members[0].running or control.pool.members[1].running)
        first, second = sorted(control.pool.members, key=lambda member: member.running)
        control.pool.members[:] = [first, second]
        wish = control.wish(2)
        await until(lambda: second.state is EngineState.DRAINING)
        long.append(asyncio.create_task(ask(client, stream=True)))
        swap = await control.outcome(wish)
        answers = await asyncio.gather(*long)
        await both_ready(control)
        assert weights(control) == ["1", "1"]
    assert [(answer.status, answer.words) for answer in answers] == [(200, {"1"}), (200, {"2"})]
    assert swap.outcome is SwapOutcome.RESTORED


async def test_no_engine_starts_with_the_refused_version_during_restoration(make: Make) -> None:
    control = make(replicas=2)
    async with control.run():
        await both_ready(control)
        first, second = (engine.double for engine in control.park.engines)
        second.loadable = lambda folder: "/2/" not in folder  # loading version 2 kills it
        first.loadable = lambda folder: "/1/" not in folder  # and restoring version 1 kills the first
        swap = await control.promote(2)
        await both_ready(control)
        assert [Path(engine.double.weights).parent.name for engine in control.park.engines[2:]] == ["1", "1"]
        assert control.names.served == Target(target(1).version, target(1).format)
    assert swap.outcome is SwapOutcome.FAILED


async def test_previous_version_stays_in_production_until_all_engines_are_switched(control: Control) -> None:
    async with control.run():
        await both_ready(control)
        control.park.engines[1].double.reload_delay_s = 0.2
        wish = control.wish(2)
        await until(lambda: control.pool.members[0].target == target(2) and len(control.pool.ready) == 1)
        assert control.names.served == Target(target(1).version, target(1).format)
        await control.outcome(wish)
        assert control.names.served == Target(target(2).version, target(2).format)


async def test_remaining_engines_start_even_if_one_engine_fails_to_start(control: Control) -> None:
    async with control.run():
        await both_ready(control)
        control.reconciler.reviver.backoff_s = (0.01, 60.0)
        control.park.unable = {0}
        control.park.engines[0].kill()
        await until(lambda: len(control.park.engines) == 3 and len(control.pool.down) == 1)
        control.park.engines[1].kill()
        await until(lambda: control.pool.members[1].state is EngineState.FAILED)
        await until(lambda: control.pool.ready == [control.pool.members[1]])


async def test_waiting_for_changes_returns_immediately_if_an_engine_has_already_died(control: Control) -> None:
    """The engine dies while the remains of another engine are being stopped, which takes seconds."""
    control.pool.fill()
    control.pool.members[1].enter(EngineState.FAILED)
    async with asyncio.timeout(1):
        await control.pool.changed(None)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await control.pool.changed(None)


async def test_overall_state_is_ready_if_one_of_several_engines_is_ready(control: Control) -> None:
    async with control.run():
        await both_ready(control)
        control.reconciler.reviver.backoff_s = (10.0,)
        control.park.engines[0].kill()
        await until(lambda: control.pool.members[0].state is EngineState.FAILED)
        assert control.pool.state is EngineState.READY
        assert control.sample("svc_engine_state", model=NAME, state="failed") == 1
        assert control.sample("svc_engine_state", model=NAME, state="ready") == 1
