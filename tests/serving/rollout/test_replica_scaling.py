"""Tests that replicas are added and removed while a server answers requests."""

import asyncio

import pytest

from serving.rollout.replica_scaling import ReplicaScaling
from serving.rollout.scaling import HOLD_S, MEAN_S
from svc.settings import EngineSettings, ReplicaRange
from svc.store.swaps import SwapOutcome
from tests.serving.control import Control, Make, ask, until
from tests.serving.versions import target

LIMITS = ReplicaRange(min=1, max=3)
PER_REPLICA = EngineSettings().max_concurrency


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def decide(control: Control, requests: int, seconds: float) -> ReplicaScaling:
    """Let the scaling observe a number of requests for a time."""
    scaling, clock = control.deployment.scaling, Clock()
    assert scaling is not None
    scaling.clock = clock
    scaling.policy.reset()
    running, control.admission.running = control.admission.running, requests
    while clock.now <= seconds:
        await scaling.step()
        clock.now += 5
    control.admission.running = running
    return scaling


async def grow(control: Control, replicas: int = 2) -> None:
    await until(lambda: not control.reconciler.promoting)  # true for a moment after a swap
    await decide(control, PER_REPLICA * (replicas - 1), MEAN_S)
    await until(lambda: len(control.pool.ready) == replicas)


async def test_fixed_number_of_replicas_does_not_follow_the_load(make: Make) -> None:
    control = make(replicas=2)
    assert control.deployment.scaling is None


async def test_replica_is_added_with_the_version_in_production_when_the_load_needs_it(make: Make) -> None:
    async with make(replicas=LIMITS).run() as control:
        assert (await control.promote(2)).outcome is SwapOutcome.SUCCEEDED
        await grow(control)
        assert {engine.target for engine in control.pool.ready} == {target(2)}
        assert all(engine.checked and engine.checked.verified for engine in control.pool.ready)
        assert control.sample("svc_replicas_wanted", model=target(2).version.name) == 2


async def test_no_more_replicas_are_added_than_the_limit(make: Make) -> None:
    async with make(replicas=LIMITS).run() as control:
        await decide(control, 100 * PER_REPLICA, 2 * MEAN_S)
        await until(lambda: len(control.pool.ready) == 3)


async def test_removed_replica_answers_its_requests_first(make: Make) -> None:
    async with make(replicas=LIMITS).run() as control, control.client() as client:
        await grow(control)
        for engine in control.park.engines:
            engine.double.proceed.clear()
        answers = [asyncio.create_task(ask(client, stream=True)) for _ in range(2)]
        await until(lambda: [engine.running for engine in control.pool.ready] == [1, 1])
        await decide(control, 0, HOLD_S + 10)
        assert len(control.pool.ready) == 1
        assert control.park.alive == 2
        for engine in control.park.engines:
            engine.double.proceed.set()
        assert [answer.words for answer in await asyncio.gather(*answers)] == [{"1"}, {"1"}]
        await until(lambda: control.park.alive == 1)


async def test_replicas_do_not_change_during_a_swap(make: Make) -> None:
    async with make(replicas=LIMITS).run() as control:
        control.double.reload_delay_s = 1.0
        swap = asyncio.create_task(control.promote(2))
        await until(lambda: control.reconciler.promoting)
        await decide(control, 10 * PER_REPLICA, 2 * MEAN_S)
        assert control.pool.size == 1
        assert (await swap).outcome is SwapOutcome.SUCCEEDED


async def test_all_replicas_are_swapped_after_the_load_has_added_one(make: Make) -> None:
    async with make(replicas=LIMITS).run() as control:
        await grow(control)
        assert (await control.promote(2)).outcome is SwapOutcome.SUCCEEDED
        assert [engine.target for engine in control.pool.ready] == [target(2), target(2)]


async def test_replica_is_refused_with_the_reason_when_memory_is_short(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make(replicas=LIMITS).run() as control:
        monkeypatch.setattr(control.slots, "shortage", lambda engines: "it needs about 9 GiB")
        scaling = await decide(control, 10 * PER_REPLICA, 2 * MEAN_S)
        assert len(control.pool.members) == 1
        assert scaling.status() == {"min": 1, "max": 3, "replicas": 1, "refused": "it needs about 9 GiB"}


async def test_restarted_server_adopts_all_replicas(make: Make) -> None:
    control = make(replicas=LIMITS)
    control.leaves = True
    async with control.run():
        await grow(control, 3)
    control.leaves = False
    control.assemble()
    async with control.run():
        assert len(control.pool.ready) == 3
        assert control.pool.size == 3
