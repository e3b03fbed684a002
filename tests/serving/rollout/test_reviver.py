"""Tests that members dying before or during a swap are restarted, and that all end with the same version."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from serving.engines.replica import Replica
from svc.engine.client import Health
from svc.engine.state import EngineState
from svc.errors import BusyError, EngineError
from svc.settings.serve import SwapChoice
from svc.store.desired import Desired
from svc.store.swaps import SwapOutcome
from svc.version import Target
from tests.serving.control import Control, Make, until
from tests.serving.engine_double import EngineDouble
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow


def slow(double: EngineDouble) -> None:
    double.reload_delay_s = 0.5


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that no two tasks start, reload or verify the same replica concurrently."""
    touched = set[Replica]()

    def guard(name: str) -> None:
        original = getattr(Replica, name)

        async def guarded(replica: Replica, *arguments: object, **named: object) -> object:
            inner = name == "verify" and replica.state is EngineState.STARTING  # as part of a start
            assert inner or replica not in touched
            touched.add(replica)
            try:
                return await original(replica, *arguments, **named)
            finally:
                if not inner:
                    touched.discard(replica)

        monkeypatch.setattr(Replica, name, guarded)

    for name in ("start", "reload", "verify"):
        guard(name)


@asynccontextmanager
async def serving(make: Make, replicas: int, **settings: object) -> AsyncIterator[Control]:
    control = make(replicas=replicas, **settings)
    control.park.prepare = slow
    make_version(control.registry, 4, width=8)
    async with control.run():
        await until(lambda: len(control.pool.ready) == replicas)
        yield control


def kill(control: Control, member: int) -> Replica:
    """Kill a member's engine and return its replica."""
    engine = control.pool.members[member]
    next(double for double in control.park.engines if double.alive and double.replica == engine.replica).kill()
    return engine


def held(control: Control) -> list[Target | None]:
    """Return the versions of the ready members."""
    return [member.target for member in control.pool.ready]


def weights(control: Control) -> list[str]:
    """Return the weights that each engine actually holds."""
    return [engine.double.weights.split("/")[-2] for engine in control.park.engines if engine.alive]


async def test_waiting_engine_that_dies_during_a_swap_is_restarted_on_the_old_version_and_then_switched(
    make: Make,
) -> None:
    async with serving(make, 3) as control:
        wish = control.wish(2)
        await until(lambda: control.pool.members[0].state is EngineState.SWAPPING)
        last = kill(control, 2)
        await until(lambda: last.state is EngineState.FAILED)
        await until(lambda: last.state is EngineState.READY)
        assert control.pool.members[0].state is EngineState.SWAPPING
        assert last.target == target(1)
        assert control.pool.restarts == 1
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED
        assert held(control) == [target(2)] * 3
        assert weights(control) == ["2"] * 3


async def test_dead_engine_is_restarted_on_the_old_version_before_a_swap_switches_it(make: Make) -> None:
    async with serving(make, 3) as control:
        control.reconciler.reviver.backoff_s = (0.3,)
        first = kill(control, 0)
        await until(lambda: first.state is EngineState.FAILED)
        wish = control.wish(2)
        await until(lambda: first.target == target(1))
        assert control.pool.members[1].state is EngineState.SWAPPING
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED
        assert held(control) == [target(2)] * 3


async def test_engine_that_dies_after_its_switch_is_switched_again(make: Make) -> None:
    async with serving(make, 2) as control:
        wish = control.wish(2)
        await until(lambda: control.pool.members[1].state is EngineState.SWAPPING)
        kill(control, 0)
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED
        assert held(control) == [target(2)] * 2


async def test_swap_waits_for_an_engine_that_is_starting(make: Make) -> None:
    async with serving(make, 2) as control:
        control.park.start_delay_s = 1.0
        wish = control.wish(2)
        await until(lambda: control.pool.members[0].state is EngineState.SWAPPING)
        last = kill(control, 1)
        swap = await control.outcome(wish)
        assert swap.outcome is SwapOutcome.SUCCEEDED
        assert held(control) == [target(2)] * 2
        assert any(f"replica {last.replica} died and is being restarted" in step for step in control.steps)


async def test_swap_continues_if_an_engine_fails_to_start(make: Make) -> None:
    async with serving(make, 2) as control:
        control.reconciler.reviver.backoff_s = (0.01, 1.0)
        control.park.failing_starts = 1
        wish = control.wish(2)
        await until(lambda: control.pool.members[0].state is EngineState.SWAPPING)
        kill(control, 1)
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED
        assert held(control) == [target(2)]
        await until(lambda: held(control) == [target(2)] * 2)


async def test_dead_engine_is_not_started_while_another_engine_is_starting(make: Make) -> None:
    async with serving(make, 2) as control:
        control.park.start_delay_s = 0.5
        wish = control.wish(4)
        await until(lambda: control.park.starting)
        control.park.start_delay_s = 0.0
        last = kill(control, 1)
        await until(lambda: last.state is EngineState.STARTING)
        assert control.park.starting == 1
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED
        assert held(control) == [target(4)] * 2
        assert control.park.most_starting == 1
        await until(lambda: control.park.alive == 2)


async def test_dead_engine_is_not_restarted_until_there_is_enough_memory(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.rollout.reviver._ROOM_PAUSE_S", 0.01)
    asked = list[int]()

    def shortage(more: int) -> str | None:
        asked.append(more)
        return "full" if control.park.starting else None

    async with serving(make, 2) as control:
        control.park.start_delay_s = 0.5
        wish = control.wish(4)
        await until(lambda: control.park.starting)
        control.park.shortage = shortage
        last = kill(control, 1)
        await until(lambda: len(asked) > 3)
        assert (last.state, set(asked)) == (EngineState.FAILED, {2})
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED
        await until(lambda: held(control) == [target(4)] * 2)


async def test_all_engines_serve_the_old_version_if_one_dies_during_a_swap_that_fails(make: Make) -> None:
    async with serving(make, 3) as control:
        second = control.park.engines[1].double
        second.on_call = lambda path: setattr(second, "probe_noise", 9.0 if "/2/" in second.weights else 0.0)
        wish = control.wish(2)
        await until(lambda: control.pool.members[0].state is EngineState.SWAPPING)
        kill(control, 2)
        assert (await control.outcome(wish)).outcome is SwapOutcome.RESTORED
        await until(lambda: held(control) == [target(1)] * 3)
        assert weights(control) == ["1"] * 3


async def test_engine_is_switched_even_if_its_health_is_briefly_unknown(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(make, 2) as control:
        client = control.pool.members[1].client
        health, bad = client.health, 4

        async def health_or_silence() -> Health:
            nonlocal bad
            bad -= 1
            return Health.BAD if bad >= 0 else await health()

        wish = control.wish(2)
        await until(lambda: control.pool.members[0].state is EngineState.SWAPPING)
        monkeypatch.setattr(client, "health", health_or_silence)
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED
        assert held(control) == [target(2)] * 2


@pytest.mark.parametrize(
    ("seed", "choice"),
    [(0, SwapChoice.AUTO), (1, SwapChoice.BLUEGREEN), (2, SwapChoice.AUTO), (3, SwapChoice.BLUEGREEN)],
)
async def test_all_engines_end_up_with_the_desired_version_regardless_of_which_die(
    make: Make, seed: int, choice: SwapChoice
) -> None:
    chance = random.Random(seed)
    async with serving(make, 3, swap=choice) as control:
        control.park.prepare = lambda double: setattr(double, "reload_delay_s", 0.05)
        for engine in control.park.engines:
            engine.double.reload_delay_s = 0.05
        control.park.start_delay_s = 0.1

        async def wish(number: int) -> Desired:
            while True:
                with suppress(BusyError):  # the server writes the served version; a person would try again
                    return control.wish(number)
                await asyncio.sleep(0.01)

        async def wish_anything() -> None:
            await wish(chance.choice((1, 2, 3, 4)))

        async def die() -> None:
            living = [engine for engine in control.park.engines if engine.alive]
            if living:
                chance.choice(living).kill()

        deeds: list[Callable[[], Awaitable[None]]] = [wish_anything, wish_anything, die]
        for _ in range(12):
            await chance.choice(deeds)()
            await asyncio.sleep(chance.uniform(0.0, 0.2))
        last = await wish(2)
        await control.outcome(last)
        await until(lambda: len(held(control)) == 3, 10)
        wanted = control.desired().target
        await until(lambda: held(control) == [wanted] * 3, 10)
        await until(lambda: control.park.alive == 3 and control.pool.all == control.pool.members, 10)
        assert weights(control) == [str(wanted.version.number)] * 3
        assert control.names.served == wanted == control.reconciler.actual.target
        assert not control.admission._closed
        assert control.names.all() == (NAME, str(wanted.version), f"{NAME}@production")


async def test_engine_startup_failure_is_reported(make: Make) -> None:
    async with serving(make, 2) as control:
        control.park.failing_starts = 1
        kill(control, 1)
        await until(lambda: "no memory" in (control.reconciler.last_error or ""))
        await until(lambda: len(control.pool.ready) == 2)


async def test_engine_starts_even_if_its_memory_cannot_be_estimated(make: Make) -> None:
    def shortage(more: int) -> str | None:
        raise EngineError("the files are gone")

    async with serving(make, 2) as control:
        control.park.start_delay_s = 0.5
        control.wish(4)
        await until(lambda: control.park.starting)
        control.park.shortage = shortage
        control.park.start_delay_s = 0.0
        last = kill(control, 1)
        await until(lambda: last.target is None)
        await until(lambda: last.state is EngineState.READY)
