"""On a GPU, engines that nobody asks sleep in place of being ended, and are verified when the next request wakes them.

The double sleeps as vLLM 0.32 does by its source; no GPU was there to compare it with.
"""

import asyncio
from collections.abc import Callable

import httpx
import pytest

from svc.engine.state import EngineState
from svc.settings import AdapterSettings
from svc.store.deployments import add_deployment
from svc.store.desired import change_desired
from svc.store.swaps import SwapOutcome
from svc.version import Format, Target, VersionId
from tests.serving.control import BODY, Make, until
from tests.serving.engine_park import fail_to_end_once
from tests.serving.home import Home
from tests.serving.rollout.test_idling import IDLE_S, OTHER, configure, hash_slowly, promoted
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow

ONE = (200, f"{NAME}@1", "1")


@pytest.fixture
def sleeping(home: Home) -> Home:
    """A home whose models are idle soon, and whose engines can sleep then."""
    configure(home, serve={"port": 0, "idle_s": IDLE_S})
    home.park.sleeps = True
    return home


async def answer(client: httpx.AsyncClient, model: str = NAME) -> tuple[int, str, str]:
    """Status, the version in the header, and the number in the text."""
    found = await client.post("/v1/chat/completions", json=BODY | {"model": model})
    text = found.json()["choices"][0]["message"]["content"].partition(".")[0] if found.is_success else ""
    return found.status_code, found.headers.get("x-model-version", ""), text


async def engines(client: httpx.AsyncClient, model: str = NAME) -> list[tuple[str, bool]]:
    """State of each engine of a model, and whether it is asleep."""
    models = (await client.get("/svc/status")).json()["models"]
    return [(one["state"], one["asleep"]) for each in models if each["model"] == model for one in each["engines"]]


async def asleep(client: httpx.AsyncClient, model: str = NAME, *, replicas: int = 1) -> None:
    """Waits until all engines of a model sleep."""
    await become(client, model, [("idle", True)] * replicas)


async def ready(client: httpx.AsyncClient, model: str) -> None:
    """Waits until the only engine of a model takes requests."""
    await become(client, model, [("ready", False)])


async def become(client: httpx.AsyncClient, model: str, wanted: list[tuple[str, bool]]) -> None:
    """Waits until the engines of a model are so."""
    async with asyncio.timeout(5):
        while await engines(client, model) != wanted:
            await asyncio.sleep(0.01)


async def settled(client: httpx.AsyncClient) -> None:
    """Waits until no request runs: an answer ends a moment after its client has it."""
    async with asyncio.timeout(5):
        while any(each["requests"]["running"] for each in (await client.get("/svc/status")).json()["models"]):
            await asyncio.sleep(0.01)


async def meanwhile(condition: Callable[[], object], value: Callable[[], int]) -> set[int]:
    """What a value is, while something is so."""
    seen = set[int]()
    while condition():
        seen.add(value())
        await asyncio.sleep(0.005)
    return seen


async def ended(client: httpx.AsyncClient, home: Home) -> None:
    """Waits until the only engine was ended, and does not sleep."""
    await until(lambda: not home.park.alive)
    assert await engines(client) == [("idle", False)]


async def test_an_engine_that_nobody_asks_sleeps_and_lives(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        assert (sleeping.park.alive, sleeping.park.asleep) == (1, 1)
        assert (await client.get("/health")).status_code == 200


async def test_the_next_requests_wait_until_it_is_awake_and_are_answered(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        assert await asyncio.gather(*(answer(client) for _ in range(5))) == [ONE] * 5
        assert len(sleeping.park.engines) == 1
        page = (await client.get("/metrics")).text
    assert 'svc_engine_wake_seconds_count{model="tuned"} 1.0' in page
    assert 'svc_engine_restarts_total{model="tuned"} 0.0' in page


async def test_nothing_is_asked_of_an_engine_that_sleeps(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        before = list(sleeping.park.double.calls)
        assert (await client.get("/metrics")).status_code == 200
        await asyncio.sleep(3 * IDLE_S)
        assert sleeping.park.double.calls == before


async def test_it_is_verified_before_it_takes_a_request(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        since = len(sleeping.park.double.calls)
        assert await answer(client) == ONE
        asked = [path for path in sleeping.park.double.calls[since:] if path != "/health"]
        assert asked[:3] == ["/wake_up", "/v1/completions", "/v1/chat/completions"]


async def test_it_sleeps_and_wakes_again_and_again(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        for _ in range(3):
            await asleep(client)
            assert await answer(client) == ONE
        assert len(sleeping.park.engines) == 1


async def test_an_engine_that_wakes_with_other_weights_is_replaced(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        sleeping.park.double.wakes_with = "/models/other/merged"
        assert await answer(client) == ONE
        assert [engine.alive for engine in sleeping.park.engines] == [False, True]


async def test_an_engine_that_does_not_fall_asleep_is_ended(sleeping: Home) -> None:
    sleeping.park.prepare = lambda double: setattr(double, "sleepless", True)
    async with sleeping.serving(f"{NAME}@1") as client:
        await ended(client, sleeping)
        assert await answer(client) == ONE


async def test_an_engine_that_does_not_wake_is_ended_and_another_started(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        sleeping.park.double.wakeless = True
        assert await answer(client) == ONE
        assert [engine.alive for engine in sleeping.park.engines] == [False, True]
        page = (await client.get("/metrics")).text
    assert 'svc_engine_wake_seconds_count{model="tuned"} 1.0' in page


async def test_an_engine_that_died_in_its_sleep_is_started_anew_by_the_next_request(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        sleeping.park.engines[0].kill()
        assert await answer(client) == ONE
        assert [engine.alive for engine in sleeping.park.engines] == [False, True]


async def test_all_engines_of_several_wake(sleeping: Home) -> None:
    configure(sleeping, serve={"port": 0, "idle_s": 2.0}, engine={"replicas": 2})  # the second starts after a second
    async with sleeping.serving(f"{NAME}@1") as client:
        await until(lambda: sleeping.park.alive == 2)
        await asleep(client, replicas=2)
        assert await answer(client) == ONE
        await until(lambda: sleeping.park.asleep == 0)
        assert (sleeping.park.alive, len(sleeping.park.engines)) == (2, 2)
        page = (await client.get("/metrics")).text
    assert 'svc_engine_wake_seconds_count{model="tuned"} 1.0' in page


async def test_of_several_engines_one_that_does_not_wake_is_started_again(sleeping: Home) -> None:
    configure(sleeping, serve={"port": 0, "idle_s": 2.0}, engine={"replicas": 2})
    async with sleeping.serving(f"{NAME}@1") as client:
        await until(lambda: sleeping.park.alive == 2)
        await asleep(client, replicas=2)
        sleeping.park.engines[0].double.wakeless = True
        assert await answer(client) == ONE
        assert len(sleeping.park.engines) == 2  # the other one woke, and the answer is its
        await until(lambda: sleeping.park.alive == 2)
        assert len(sleeping.park.engines) == 3


async def test_a_promotion_ends_the_engine_that_sleeps_and_starts_the_new_version(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        assert (await promoted(sleeping, 2)).outcome is SwapOutcome.SUCCEEDED
        assert await engines(client) == [("ready", False)]
        assert await answer(client) == (200, f"{NAME}@2", "2")
        assert [engine.alive for engine in sleeping.park.engines] == [False, True]
        assert "/collective_rpc" not in sleeping.park.engines[0].double.calls
        await asleep(client)
        assert await answer(client) == (200, f"{NAME}@2", "2")


async def test_an_engine_does_not_fall_asleep_when_a_promotion_compares_files(
    sleeping: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        hash_slowly(sleeping, monkeypatch, 4 * IDLE_S)
        assert (await promoted(sleeping, 2)).outcome is SwapOutcome.SUCCEEDED
        assert await answer(client) == (200, f"{NAME}@2", "2")
        assert len(sleeping.park.engines) == 1


async def test_no_engine_stays_asleep_when_a_promotion_wakes_a_model_of_several_engines(sleeping: Home) -> None:
    configure(sleeping, serve={"port": 0, "idle_s": 2.0}, engine={"replicas": 2})  # the second starts after a second
    async with sleeping.serving(f"{NAME}@1") as client:
        await until(lambda: sleeping.park.alive == 2)
        await asleep(client, replicas=2)
        assert (await promoted(sleeping, 2)).outcome is SwapOutcome.SUCCEEDED
        assert sleeping.park.asleep == 0
        assert (await promoted(sleeping, 3)).outcome is SwapOutcome.SUCCEEDED
        assert await answer(client) == (200, f"{NAME}@3", "3")
        assert not any("/collective_rpc" in engine.double.calls for engine in sleeping.park.engines[:2])


async def test_a_server_that_ends_takes_along_what_sleeps(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
    assert sleeping.park.alive == 0


async def test_a_server_that_is_cut_off_leaves_an_engine_asleep_that_the_next_one_ends(make: Make) -> None:
    control = make()
    control.leaves = True
    async with control.run():
        await control.replica.sleep()
        await control.replica.leave()  # as one that is killed
    left, control.leaves = control.park.left[0], False
    control.assemble()
    async with asyncio.timeout(5), control.run():
        await control.serves(target(1))
        assert not left.alive
        assert (control.park.ended, control.park.alive) == ([0], 1)


async def test_adapters_are_loaded_and_verified_again_after_a_wake(make: Make) -> None:
    async with make(format=Format.ADAPTER, adapters=AdapterSettings(max_loaded=2)).run() as control:
        version_one = target(1, Format.ADAPTER)
        await control.replica.sleep()
        assert control.replica.adapters is None
        await control.replica.wake(version_one)
        assert control.double.calls.count("/v1/load_lora_adapter") == 2
        assert len(control.double.adapters) == 1
        assert control.state is EngineState.READY


async def test_no_engine_sleeps_or_wakes_while_another_one_starts(sleeping: Home) -> None:
    """vLLM measures free memory at its start and when it sleeps, and fails where another engine changes it."""
    make_version(sleeping.registry, 7, name=OTHER)
    configure(sleeping, serve={"port": 0}, models={NAME: {"idle_s": IDLE_S}})
    park = sleeping.park
    async with sleeping.serving(f"{NAME}@1") as client:
        first, park.start_delay_s = park.double, 1.5
        first.proceed.clear()  # a running answer keeps it awake, however long the server takes to see the other model
        asking = asyncio.create_task(answer(client))
        await until(lambda: first.running)
        serve(sleeping, OTHER, 7)
        await until(lambda: park.starting)
        first.proceed.set()
        await asking
        assert await meanwhile(lambda: park.starting, lambda: park.asleep) == {0}
        await until(lambda: park.asleep)
        await ready(client, OTHER)
        park.engines[1].kill()
        await until(lambda: park.starting)
        asking = asyncio.create_task(answer(client))
        assert await meanwhile(lambda: park.starting, lambda: park.asleep) == {1}
        assert await asking == ONE


@pytest.fixture
def crowded(sleeping: Home) -> Home:
    """A GPU with room for one engine that is awake, and for two that sleep beside it; a second and a third model."""
    make_version(sleeping.registry, 7, name=OTHER)
    make_version(sleeping.registry, 9, name="third")
    configure(sleeping, serve={"port": 0, "idle_s": 60})
    sleeping.park.shortage = lambda more: _full(sleeping, more, beside=2)
    return sleeping


def _full(home: Home, more: int, *, beside: int) -> str | None:
    """Of what wakes, the room is free already."""
    awake = home.park.alive - home.park.asleep
    return "full" if awake + more > 1 or home.park.asleep > beside else None


def serve(home: Home, name: str, number: int) -> None:
    change_desired(home.store, None, Target(VersionId(name, number), Format.MERGED), None)
    add_deployment(home.store, name)


async def test_a_model_gives_way_by_sleeping_and_they_take_turns(crowded: Home) -> None:
    async with crowded.serving(f"{NAME}@1") as client:
        await answer(client)
        serve(crowded, OTHER, 7)
        await asleep(client)
        await ready(client, OTHER)
        assert await answer(client, OTHER) == (200, f"{OTHER}@7", "7")
        await settled(client)
        assert await answer(client) == ONE
        await asleep(client, OTHER)
        await settled(client)
        assert await answer(client, OTHER) == (200, f"{OTHER}@7", "7")
        assert len(crowded.park.engines) == 2


async def test_those_that_sleep_are_ended_where_what_they_hold_is_too_much(crowded: Home) -> None:
    async with crowded.serving(f"{NAME}@1") as client:
        await answer(client)
        serve(crowded, OTHER, 7)
        await asleep(client)
        await ready(client, OTHER)
        crowded.park.shortage = lambda more: _full(crowded, more, beside=1)
        await answer(client, OTHER)
        await settled(client)
        serve(crowded, "third", 9)
        await ready(client, "third")
        assert await engines(client) == [("idle", False)]  # the one that was asked least lately
        assert await engines(client, OTHER) == [("idle", True)]


async def test_a_model_that_wakes_does_not_end_itself_to_make_room(sleeping: Home) -> None:
    sleeping.park.room = "full"
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        assert await answer(client) == ONE
        assert len(sleeping.park.engines) == 1


async def test_an_engine_that_cannot_be_ended_either_is_ended_before_the_next_start(
    sleeping: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_end_once(monkeypatch)
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        sleeping.park.double.wakeless = True
        assert await answer(client) == ONE
        assert [engine.alive for engine in sleeping.park.engines] == [False, True]
