"""Tests that models that engines cannot reload correctly, such as MoE models on a CPU, are never reloaded."""

import pytest

from svc.store.swaps import SwapKind, SwapOutcome
from tests.serving.control import Control, Load, Make, until
from tests.serving.versions import target

pytestmark = pytest.mark.slow

RELOAD = "/collective_rpc"
FULL = "it needs 2 GiB, 1 GiB is free"


def reloads(control: Control) -> int:
    return sum(engine.double.calls.count(RELOAD) for engine in control.park.engines)


@pytest.fixture
def mixture(make: Make) -> Control:
    control = make()
    control.park.reloads = False
    return control


async def test_each_promotion_starts_a_second_engine_if_memory_suffices(mixture: Control) -> None:
    async with mixture.run(), mixture.client() as client:
        async with Load(client).run() as load:
            for number in (2, 1, 2):
                swap = await mixture.promote(number)
                assert (swap.outcome, swap.kind) == (SwapOutcome.SUCCEEDED, SwapKind.BLUEGREEN)
        load.check()
    assert reloads(mixture) == 0


async def test_single_engine_restarts_for_each_promotion_if_memory_is_insufficient(mixture: Control) -> None:
    async with mixture.run(), mixture.client() as client:
        mixture.park.room = FULL
        async with Load(client).run() as load:
            for number in (2, 1, 2):
                swap = await mixture.promote(number)
                assert (swap.outcome, swap.kind) == (SwapOutcome.SUCCEEDED, SwapKind.INPLACE)
        load.check()
        assert "do not reload the version correctly in place" in "\n".join(mixture.steps)
    assert reloads(mixture) == 0


async def test_all_engines_restart_if_memory_is_insufficient_for_an_additional_engine(make: Make) -> None:
    control = make(replicas=2)
    control.park.reloads = False
    async with control.run():
        await until(lambda: len(control.pool.ready) == 2)
        control.park.room = FULL
        swap = await control.promote(2)
        assert (swap.outcome, swap.kind) == (SwapOutcome.SUCCEEDED, SwapKind.ROLLING)
        assert {member.target for member in control.pool.members} == {target(2)}
    assert reloads(control) == 0


async def test_engine_that_has_already_switched_is_restarted_with_the_previous_version_if_the_swap_fails(
    make: Make,
) -> None:
    control = make(replicas=2)
    control.park.reloads = False
    async with control.run():
        await until(lambda: len(control.pool.ready) == 2)
        control.park.room = FULL
        second = control.pool.members[1].replica
        control.park.unable = {second}
        assert (await control.promote(2)).outcome is SwapOutcome.FAILED
        control.park.unable = set()
        await until(lambda: {member.target for member in control.pool.members} == {target(1)})
    assert reloads(control) == 0
