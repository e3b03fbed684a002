"""Tests that an engine is verified before it gets requests, and is always stopped."""

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from serving.admission.errors import EngineUnavailableError
from serving.engines.replica import NO_WEIGHTS, Replica
from serving.engines.transport import EngineDiedError
from svc.engine.client import Health
from svc.engine.state import EngineState
from svc.errors import EngineError, IntegrityError, NotFoundError, ProbeError
from svc.store.swaps import SwapOutcome
from tests.serving.control import Control, Make, until
from tests.serving.engine_park import KILLED
from tests.serving.versions import NAME, make_version, target


@pytest.fixture
def replica(make: Make) -> Replica:
    """Return a replica without an engine."""
    return make().replica


async def test_engine_is_ready_after_verification(make: Make) -> None:
    control = make()
    await control.replica.start(target(1))
    assert (control.state, control.admission.unavailable_reason) == (EngineState.READY, None)
    assert control.double.calls == ["/v1/completions"]
    await control.replica.stop()


async def test_no_request_is_admitted_before_verification(make: Make) -> None:
    control = make()
    reasons = list[str | None]()
    control.park.prepare = lambda double: setattr(
        double, "on_call", lambda path: reasons.append(control.admission.unavailable_reason)
    )
    await control.replica.start(target(1))
    assert reasons == ["the engine is starting"]
    await control.replica.stop()


async def test_engine_with_unexpected_weights_is_stopped(make: Make) -> None:
    control = make()
    make_version(control.registry, 4, probes_of="/elsewhere")
    with pytest.raises(ProbeError):
        await control.replica.start(target(4))
    assert (control.state, control.park.alive, control.replica.has_engine) == (EngineState.FAILED, 0, False)


async def test_engine_is_stopped_if_its_startup_fails(make: Make) -> None:
    control = make()
    control.park.failing_starts = 1
    with pytest.raises(EngineError, match="no memory"):
        await control.replica.start(target(1))
    assert (control.state, control.park.alive) == (EngineState.FAILED, 0)
    assert control.admission.unavailable_reason == "the engine has failed"


@pytest.mark.parametrize("start_delay_s", [0, 10])
async def test_engine_is_stopped_if_its_files_were_altered(make: Make, start_delay_s: float) -> None:
    control = make()
    control.park.start_delay_s = start_delay_s
    (control.registry.folder(target(1).version) / "merged" / "config.json").write_text("{}")
    async with asyncio.timeout(5):
        with pytest.raises(IntegrityError):
            await control.replica.start(target(1))
    assert (control.state, control.park.alive) == (EngineState.FAILED, 0)
    assert control.replica.weights is NO_WEIGHTS


async def test_altered_files_are_reported_if_they_prevented_the_engine_startup(make: Make) -> None:
    control = make()
    control.park.failing_starts = 1
    (control.registry.folder(target(1).version) / "merged" / "config.json").write_text("{}")
    with pytest.raises(IntegrityError):
        await control.replica.start(target(1))
    assert control.park.alive == 0


async def test_no_engine_starts_if_the_version_does_not_exist(make: Make) -> None:
    control = make()
    with pytest.raises(NotFoundError):
        await control.replica.start(target(9))
    assert control.park.engines == []


async def test_starting_an_engine_stops_the_previous_engine(make: Make) -> None:
    control = make()
    await control.replica.start(target(1))
    await control.replica.start(target(2))
    assert [engine.alive for engine in control.park.engines] == [False, True]
    await control.replica.stop()


async def test_no_engine_keeps_running_after_a_cancelled_startup(make: Make) -> None:
    control = make()
    control.park.start_delay_s = 10
    starting = asyncio.create_task(control.replica.start(target(1)))
    await until(lambda: control.park.alive)
    starting.cancel()
    await asyncio.wait({starting})
    assert starting.cancelled()
    assert (control.park.alive, control.state) == (0, EngineState.FAILED)


async def test_engine_is_stopped_by_the_next_stop_call_after_a_cancelled_stop(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = make()
    await control.replica.start(target(1))
    engine = control.park.engines[0]
    stop = engine.stop
    monkeypatch.setattr(engine, "stop", lambda: asyncio.sleep(10))
    stopping = asyncio.create_task(control.replica.stop())
    await asyncio.sleep(0.01)
    stopping.cancel()
    await asyncio.wait({stopping})
    monkeypatch.setattr(engine, "stop", stop)
    await control.replica.stop()
    assert control.park.alive == 0


async def test_engine_death_is_reported_with_the_exit_code(control: Control) -> None:
    died = asyncio.create_task(control.replica.watch.died())
    await asyncio.sleep(0.01)
    control.park.engines[0].kill()
    assert str(KILLED) in await died


@pytest.mark.slow
async def test_silent_engine_counts_as_dead_after_its_timeout(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent() -> Health:
        return Health.BAD

    monkeypatch.setattr("serving.engines.engine_watch._UNHEALTHY_S", 0.2)
    control = make()
    await control.replica.start(target(1))
    monkeypatch.setattr(control.replica.client, "health", silent)
    async with asyncio.timeout(2):
        assert "it has not answered health checks" in await control.replica.watch.died()
    await control.replica.stop()


@pytest.mark.parametrize("health_s", [0.05, 60.0], ids=["at the next check", "at once, where a request found it"])
async def test_engine_counts_as_dead_if_it_reports_a_dead_engine_core(
    control: Control, monkeypatch: pytest.MonkeyPatch, health_s: float
) -> None:
    monkeypatch.setattr("serving.engines.engine_watch._HEALTH_S", health_s)
    died = asyncio.create_task(control.replica.watch.died())
    await asyncio.sleep(0.01)
    control.park.engines[0].double.dead = True
    if health_s > 1:
        control.replica.watch.suspect()
    async with asyncio.timeout(2):
        await died
    assert control.replica.state is not EngineState.READY


async def test_engine_that_seems_dead_gets_no_requests_until_its_health_is_checked(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def late() -> Health:
        await asked.wait()
        return Health.GOOD

    monkeypatch.setattr(control.replica.client, "health", late)
    with suppress(EngineDiedError):
        async with control.balancer.lease(NAME):
            raise EngineDiedError("gone")
    with pytest.raises(EngineUnavailableError):
        async with control.balancer.lease(NAME):
            pass
    asked.set()
    async with asyncio.timeout(2):
        while control.replica.watch.suspected:
            await asyncio.sleep(0.01)
    async with control.balancer.lease(NAME):
        pass


async def test_reload_fails_if_the_engine_core_is_dead(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's API server then waits for the response itself and does not exit."""
    monkeypatch.setattr("serving.engines.engine_watch._HEALTH_S", 0.05)
    double = control.park.engines[0].double
    double.reload_delay_s = 3600
    control.replica.enter(EngineState.SWAPPING)
    reloading = asyncio.create_task(control.replica.reload(Path("/models/tuned/2")))
    await until(lambda: "/collective_rpc" in double.calls)
    double.dead = True
    async with asyncio.timeout(2):
        with pytest.raises(EngineError, match="refuses connections"):
            await reloading


@pytest.mark.slow
async def test_engine_with_unknown_health_is_not_considered_dead(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unknown() -> Health:
        return Health.UNKNOWN

    monkeypatch.setattr("serving.engines.engine_watch._UNHEALTHY_S", 0.1)
    monkeypatch.setattr(control.replica.client, "health", unknown)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await control.replica.watch.died()


async def test_replica_client_raises_if_no_engine_runs(replica: Replica) -> None:
    with pytest.raises(RuntimeError):
        _ = replica.client


async def test_only_ready_engines_accept_requests(make: Make) -> None:
    control = make()
    admits = {}
    for state in EngineState:
        control.replica.enter(EngineState.STOPPED)
        control.replica.enter(state)
        admits[state] = control.admission.unavailable_reason is None
    assert [state for state, admitted in admits.items() if admitted] == [EngineState.READY]


async def test_engine_state_is_in_the_metrics(make: Make) -> None:
    control = make()
    control.replica.enter(EngineState.DRAINING)
    shown = {state: control.sample("svc_engine_state", model=NAME, state=state) for state in EngineState}
    assert shown == {state: float(state is EngineState.DRAINING) for state in EngineState}


@pytest.mark.slow
async def test_new_identity_is_recorded_whenever_an_engine_loads_weights(control: Control) -> None:
    loads = [control.replica.weights]
    await control.promote(2)
    loads.append(control.replica.weights)
    make_version(control.registry, 4, probes_of="/elsewhere")
    await control.promote(4)
    loads.append(control.replica.weights)
    control.park.engines[0].kill()
    await until(lambda: control.replica.weights not in loads)
    loads.append(control.replica.weights)
    assert len(set(loads)) == 4
    assert [load.fresh for load in loads] == [True, False, False, True]


@pytest.mark.slow
async def test_identity_of_loaded_weights_is_unchanged_after_a_refused_swap(make: Make) -> None:
    async with make(drain_timeout_s=0.05).run() as control:
        control.park.room = "full"
        load = control.replica.weights
        with control.replica.occupied():
            assert (await control.promote(2)).outcome is SwapOutcome.REFUSED
        assert (control.state, control.replica.weights) == (EngineState.READY, load)
