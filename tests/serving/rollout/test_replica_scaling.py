"""Tests that replicas are added and removed while a server answers requests."""

import asyncio
from itertools import pairwise

import pytest

from serving.rollout.replica_scaling import ReplicaScaling
from serving.rollout.scaling import MEAN_S
from svc.settings.engine import EngineSettings, ReplicaRange
from svc.store.swaps import SwapOutcome
from tests.builders.clocks import Clock
from tests.serving.control import Control, Make, ask, until
from tests.serving.versions import target

LIMITS = ReplicaRange(min=1, max=3)
PER_REPLICA = EngineSettings().max_concurrency


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


async def test_fixed_replica_count_is_not_scaled_with_the_load(make: Make) -> None:
    control = make(replicas=2)
    assert control.deployment.scaling is None


@pytest.mark.slow
async def test_replica_with_the_production_version_is_added_under_high_load(make: Make) -> None:
    async with make(replicas=LIMITS).run() as control:
        assert (await control.promote(2)).outcome is SwapOutcome.SUCCEEDED
        await grow(control)
        assert {engine.target for engine in control.pool.ready} == {target(2)}
        assert all(engine.checked and engine.checked.verified for engine in control.pool.ready)
        assert control.sample("svc_replicas_wanted", model=target(2).version.name) == 2


@pytest.mark.slow
async def test_replicas_are_not_added_beyond_the_configured_maximum(make: Make) -> None:
    async with make(replicas=LIMITS).run() as control:
        await decide(control, 100 * PER_REPLICA, 2 * MEAN_S)
        await until(lambda: len(control.pool.ready) == 3)


@pytest.mark.slow
async def test_replica_completes_its_running_requests_before_it_is_removed(make: Make) -> None:
    async with make(replicas=LIMITS).run() as control, control.client() as client:
        await grow(control)
        for engine in control.park.engines:
            engine.double.proceed.clear()
        answers = [asyncio.create_task(ask(client, stream=True)) for _ in range(3)]
        await until(lambda: sorted(engine.running for engine in control.pool.ready) == [1, 2])
        await decide(control, 0, LIMITS.remove_after_s + 10)
        assert len(control.pool.ready) == 1
        assert control.park.alive == 2
        for engine in control.park.engines:
            engine.double.proceed.set()
        assert [answer.words for answer in await asyncio.gather(*answers)] == [{"1"}] * 3
        await until(lambda: control.park.alive == 1)


@pytest.mark.slow
async def test_replicas_do_not_change_during_a_swap(make: Make) -> None:
    async with make(replicas=LIMITS).run() as control:
        control.double.reload_delay_s = 1.0
        swap = asyncio.create_task(control.promote(2))
        await until(lambda: control.reconciler.promoting)
        await decide(control, 10 * PER_REPLICA, 2 * MEAN_S)
        assert control.pool.size == 1
        assert (await swap).outcome is SwapOutcome.SUCCEEDED


@pytest.mark.slow
async def test_swap_includes_replicas_added_under_high_load(make: Make) -> None:
    async with make(replicas=LIMITS).run() as control:
        await grow(control)
        assert (await control.promote(2)).outcome is SwapOutcome.SUCCEEDED
        assert [engine.target for engine in control.pool.ready] == [target(2), target(2)]


@pytest.mark.slow
async def test_additional_replica_is_refused_with_the_reason_when_memory_is_insufficient(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make(replicas=LIMITS).run() as control:
        monkeypatch.setattr(control.park, "shortage", lambda more: "it needs about 9 GiB")
        scaling = await decide(control, 10 * PER_REPLICA, 2 * MEAN_S)
        assert len(control.pool.members) == 1
        assert scaling.status() == {"min": 1, "max": 3, "replicas": 1, "refused": "it needs about 9 GiB"}


async def test_as_many_replicas_are_added_as_fit_in_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async with make(replicas=LIMITS).run() as control:
        monkeypatch.setattr(control.park, "shortage", lambda more: "full" if more > 1 else None)
        await decide(control, 10 * PER_REPLICA, MEAN_S)
        assert control.pool.size == 2


async def test_refused_replica_is_retried_with_backoff_and_added_once_it_fits_in_memory(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make(replicas=ReplicaRange(min=1, max=2)).run() as control:
        scaling = control.deployment.scaling
        asked = list[float]()

        def shortage(more: int) -> str | None:
            assert scaling
            asked.append(scaling.clock())
            return "no room" if len(asked) < 6 else None

        monkeypatch.setattr(control.park, "shortage", shortage)
        await decide(control, 10 * PER_REPLICA, 400)
        assert [later - now for now, later in pairwise(asked[:6])] == [5, 10, 20, 40, 60]
        assert control.pool.size == 2


@pytest.mark.slow
async def test_dead_additional_replica_is_restarted_once_memory_suffices(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.rollout.reviver._ROOM_PAUSE_S", 0.01)
    async with make(replicas=LIMITS).run() as control:
        control.reconciler.reviver.backoff_s = (0.01,)
        await grow(control)
        asked = list[object]()
        monkeypatch.setattr(control.park, "shortage", lambda more: asked.append(more) or "full")  # type: ignore[func-returns-value]
        control.park.engines[1].kill()
        await until(lambda: len(asked) > 3)
        assert control.park.alive == 1
        monkeypatch.setattr(control.park, "shortage", lambda more: None)
        await until(lambda: len(control.pool.ready) == 2)


async def test_failed_memory_check_does_not_stop_the_server(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def shortage(more: int) -> str | None:
        raise OSError("cannot allocate memory")

    async with make(replicas=LIMITS).run() as control:
        monkeypatch.setattr(control.park, "shortage", shortage)
        scaling = await decide(control, 10 * PER_REPLICA, 2 * MEAN_S)
        assert scaling.status()["refused"] == "cannot allocate memory"


@pytest.mark.slow
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
