"""Tests that a restarted server adopts running engines that pass verification."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from serving.rollout.served import Began, Ended, served_spans
from svc.engine.state import EngineState
from svc.errors import IntegrityError
from svc.store.swaps import SwapOutcome, begin_swap, find_swap
from tests.serving.control import Control, Make, ask, until
from tests.serving.engine_park import DoubleEngine
from tests.serving.versions import NAME, target

ONE, TWO = f"{NAME}@1", f"{NAME}@2"


@asynccontextmanager
async def again(control: Control) -> AsyncIterator[Control]:
    """Start the server again after it has stopped without stopping its engines."""
    control.leaves = False
    control.assemble()
    async with control.run():
        yield control


@pytest.fixture
async def left(make: Make) -> Control:
    """Return a stopped server whose engine is still running with version 1."""
    control = make()
    control.leaves = True
    async with control.run():
        pass
    return control


@pytest.mark.slow
async def test_restarted_server_adopts_the_running_engine(left: Control) -> None:
    probes = left.double.calls.count("/v1/completions")
    async with again(left) as control, control.client() as client:
        assert (await ask(client, stream=True)).words == {"1"}
        assert len({engine.double.weights for engine in control.park.engines}) == 1
        assert not any("/1/" not in engine.double.weights for engine in control.park.engines)
        assert control.double.calls.count("/v1/completions") == probes + 1
        assert control.park.alive == 1


async def test_history_shows_that_the_server_was_lost_and_the_engine_was_adopted(left: Control) -> None:
    async with again(left) as control:
        await until(lambda: len(served_spans(control.store, NAME)) == 2)
        spans = served_spans(control.store, NAME)
    assert [(span.began_by, span.ended_by) for span in spans] == [(Began.START, Ended.LOST), (Began.ADOPTED, None)]


@pytest.mark.slow
async def test_adopted_engine_can_be_switched_to_another_version_and_is_monitored(left: Control) -> None:
    async with again(left) as control:
        assert (await control.promote(2)).outcome is SwapOutcome.SUCCEEDED
        control.park.engines[-1].kill()
        await until(lambda: control.state is not EngineState.READY)
        await control.serves(target(2))
        assert control.pool.restarts == 1


async def test_orphaned_engine_with_an_unknown_version_is_stopped(left: Control) -> None:
    (engine,) = left.park.left.values()
    engine.holds = None  # as if its server had died during a reload
    async with again(left) as control:
        assert not engine.alive
        assert control.park.ended == [0]
        assert control.double is not engine.double
        await control.serves(target(1))


@pytest.mark.slow
async def test_orphaned_engine_with_unexpected_weights_is_stopped(left: Control) -> None:
    (engine,) = left.park.left.values()
    engine.double.weights = "/elsewhere"
    async with again(left) as control, control.client() as client:
        assert not engine.alive
        assert (await ask(client, stream=False)).words == {"1"}


async def test_new_engine_starts_if_the_old_engine_died_while_no_server_was_running(left: Control) -> None:
    (engine,) = left.park.left.values()
    engine.kill()
    async with again(left) as control:
        await control.serves(target(1))


async def test_altered_files_are_not_served_by_an_adopted_engine(left: Control) -> None:
    (left.registry.folder(target(1).version) / "merged" / "config.json").write_text("{}")
    with pytest.raises(IntegrityError):
        async with again(left):
            pass
    await left.pool.stop()
    assert left.park.alive == 0


@pytest.mark.slow
async def test_swap_interrupted_by_a_server_crash_is_undone_and_then_repeated(
    left: Control,
) -> None:
    wish = left.wish(2)
    begun = begin_swap(left.store, wish)
    started = len(left.park.engines)
    async with again(left) as control, control.client() as client:
        await control.serves(target(2))
        assert (await ask(client, stream=False)).words == {"2"}
        assert control.desired().target == target(2)
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED
        swap = find_swap(left.store, NAME, wish.generation)
        assert swap is not None and swap.id == begun
        assert any("weights of" in step for step in control.steps)
    assert len(left.park.engines) == started + 1  # the adopted one was reloaded in place
    assert left.park.ended == []


@pytest.mark.slow
async def test_swap_completed_before_a_server_crash_is_recorded_as_successful_after_the_restart(left: Control) -> None:
    async with again(left) as control:
        await control.promote(2)
        control.leaves = True
    wish = left.desired()
    begin_swap(left.store, wish)
    async with again(left) as control:
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED
        assert control.names.served is not None and control.names.served.version == target(2).version


@pytest.mark.slow
async def test_only_one_of_two_orphaned_engines_is_adopted_if_one_replica_is_configured(make: Make) -> None:
    """A server that dies while its second engine is replacing the first leaves two engines."""
    control = make(replicas=2)
    control.leaves = True
    async with control.run():
        await until(lambda: len(control.pool.ready) == 2)
    control.replicas = 1
    async with again(control):
        assert control.park.alive == 1
        assert control.park.ended == [1]


@pytest.mark.slow
async def test_all_engines_of_a_stopped_server_are_adopted(make: Make) -> None:
    control = make(replicas=2)
    control.leaves = True
    async with control.run():
        await until(lambda: len(control.pool.ready) == 2)
    started = len(control.park.engines)
    async with again(control):
        assert len(control.pool.ready) == 2
        assert len(control.park.engines) == started + 2


@pytest.mark.slow
async def test_additional_engine_is_started_if_fewer_were_adopted_than_are_configured(make: Make) -> None:
    control = make()
    control.leaves = True
    async with control.run():
        pass
    control.replicas = 2
    async with again(control):
        await until(lambda: len(control.pool.ready) == 2)
        assert sorted(engine.replica for engine in control.pool.members) == [0, 1]
        await asyncio.sleep(0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1], ids=["first", "second"])
async def test_no_engine_keeps_running_if_the_server_stops_during_adoption(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    control = make(replicas=2)
    control.leaves = True
    async with control.run():
        await until(lambda: len(control.pool.ready) == 2)
    adopt, hangs = DoubleEngine.adopt, asyncio.Event()

    async def hanging(engine: DoubleEngine) -> None:
        await adopt(engine)
        if engine.replica == number:
            hangs.set()
            await asyncio.sleep(60)

    monkeypatch.setattr(DoubleEngine, "adopt", hanging)
    control.assemble()
    adopting = asyncio.create_task(control.pool.adopt(target(1), lambda: None))
    await hangs.wait()
    adopting.cancel()
    await asyncio.wait({adopting})
    await control.stop()
    assert control.park.alive == 0
    await asyncio.sleep(0.05)  # a killed double closes its socket a few turns of the loop later


@pytest.mark.slow
async def test_first_adopted_engine_answers_requests_while_the_second_engine_is_being_adopted(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = make(replicas=2)
    control.leaves = True
    async with control.run():
        await until(lambda: len(control.pool.ready) == 2)
    control.leaves, adopt, first, go = False, DoubleEngine.adopt, asyncio.Event(), asyncio.Event()

    async def adopt_in_turn(engine: DoubleEngine) -> None:
        if first.is_set():
            await go.wait()
        first.set()
        await adopt(engine)

    monkeypatch.setattr(DoubleEngine, "adopt", adopt_in_turn)
    control.assemble()
    starting = asyncio.create_task(control.start())
    try:
        await until(lambda: control.pool.ready)
        async with control.client() as client:
            answer = await ask(client, stream=False)
        assert (answer.status, answer.version) == (200, ONE)
    finally:
        go.set()
        await starting
        await control.stop()
