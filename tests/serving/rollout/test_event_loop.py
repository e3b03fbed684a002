"""Tests that swaps, first loads and adoptions never block the event loop with disk or process operations."""

import pytest

from svc.engine.state import EngineState
from svc.store.swaps import SwapKind, SwapOutcome
from tests.event_loop import watched_loop
from tests.serving.control import Make, until
from tests.serving.versions import OTHER_FACTS, make_version, target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number", "replicas"),
    [(SwapKind.INPLACE, 2, 1), (SwapKind.ROLLING, 2, 2), (SwapKind.BLUEGREEN, 4, 1)],
)
async def test_swap_does_not_block_the_event_loop(make: Make, kind: SwapKind, number: int, replicas: int) -> None:
    control = make(replicas=replicas)
    make_version(control.registry, 4, width=8)
    async with control.run():
        await until(lambda: len(control.pool.ready) == replicas)
        with watched_loop() as watch:
            swap = await control.reconciler.swap.run(target(1), target(number), lambda step: None)
        assert (swap.outcome, swap.kind) == (SwapOutcome.SUCCEEDED, kind)
        assert (watch.waits, watch.slow) == ([], [])


@pytest.mark.slow
async def test_loading_a_version_for_the_first_time_does_not_block_the_event_loop(make: Make) -> None:
    control = make(facts=OTHER_FACTS)
    async with control.run():
        control.park.room = "full"
        with watched_loop() as watch:
            swap = await control.reconciler.swap.run(target(1), target(2), lambda step: None)
        assert swap.outcome is SwapOutcome.SUCCEEDED
        assert [call for call in watch.waits if "engine-0.sock" not in call] == []  # the double's own socket


@pytest.mark.slow
async def test_adoption_does_not_block_the_event_loop(make: Make) -> None:
    control = make()
    control.leaves = True
    async with control.run():
        pass
    control.leaves = False
    control.assemble()
    with watched_loop() as watch:
        assert await control.pool.adopt(target(1), lambda: None)
    assert watch.waits == []
    assert control.state is EngineState.READY
    await control.pool.stop()
