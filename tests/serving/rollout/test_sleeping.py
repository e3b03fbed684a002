"""Tests that idle engines on a GPU sleep instead of stopping, and are verified when a request wakes them.

The engine double sleeps as vLLM 0.32 does according to its source. This was not compared with a GPU.
"""

import asyncio
from collections.abc import Callable

import httpx
import pytest

from svc.engine.state import EngineState
from svc.settings.engine import AdapterSettings
from svc.store.deployments import add_deployment
from svc.store.desired import change_desired
from svc.store.swaps import SwapOutcome
from svc.version import Format, Target, VersionId
from tests.serving.control import BODY, Make, until
from tests.serving.engine_park import fail_to_end_once
from tests.serving.home import Home
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow

OTHER = "other"
IDLE_S = 0.2
ONE = (200, f"{NAME}@1", "1")


@pytest.fixture
def sleeping(home: Home) -> Home:
    """Return a home whose models become idle quickly and whose engines can sleep."""
    home.configure(serve={"idle_s": IDLE_S})
    home.park.sleeps = True
    return home


async def answer(client: httpx.AsyncClient, model: str = NAME) -> tuple[int, str, str]:
    """Return the response status, the version in the header and the number in the text."""
    response = await client.post("/v1/chat/completions", json=BODY | {"model": model})
    text = response.json()["choices"][0]["message"]["content"].partition(".")[0] if response.is_success else ""
    return response.status_code, response.headers.get("x-model-version", ""), text


async def engines(client: httpx.AsyncClient, model: str = NAME) -> list[tuple[str, bool]]:
    """Return the state of each of a model's engines, and whether it is asleep."""
    models = (await client.get("/svc/status")).json()["models"]
    return [
        (engine["state"], engine["asleep"]) for each in models if each["model"] == model for engine in each["engines"]
    ]


async def asleep(client: httpx.AsyncClient, model: str = NAME, *, replicas: int = 1) -> None:
    """Wait until all engines of a model are asleep."""
    await become(client, model, [("idle", True)] * replicas)


async def ready(client: httpx.AsyncClient, model: str) -> None:
    """Wait until a model's only engine accepts requests."""
    await become(client, model, [("ready", False)])


async def become(client: httpx.AsyncClient, model: str, wanted: list[tuple[str, bool]]) -> None:
    """Wait until a model's engines have these states."""
    async with asyncio.timeout(5):
        while await engines(client, model) != wanted:
            await asyncio.sleep(0.01)


async def settled(client: httpx.AsyncClient) -> None:
    """Wait until no request is running. A request ends a moment after its client has received the answer."""
    async with asyncio.timeout(5):
        while any(each["requests"]["running"] for each in (await client.get("/svc/status")).json()["models"]):
            await asyncio.sleep(0.01)


async def meanwhile(condition: Callable[[], object], value: Callable[[], int]) -> set[int]:
    """Return the values that are read repeatedly while a condition holds."""
    seen = set[int]()
    while condition():
        seen.add(value())
        await asyncio.sleep(0.005)
    return seen


async def ended(client: httpx.AsyncClient, home: Home) -> None:
    """Wait until the only engine has been stopped and is not asleep."""
    await until(lambda: not home.park.alive)
    assert await engines(client) == [("idle", False)]


async def test_idle_engine_sleeps_and_stays_alive(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        assert (sleeping.park.alive, sleeping.park.asleep) == (1, 1)
        assert (await client.get("/health")).status_code == 200


async def test_requests_for_a_sleeping_model_wake_its_engine_and_are_answered(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        assert await asyncio.gather(*(answer(client) for _ in range(5))) == [ONE] * 5
        assert len(sleeping.park.engines) == 1
        page = (await client.get("/metrics")).text
    assert 'svc_engine_wake_seconds_count{model="tuned"} 1.0' in page
    assert 'svc_engine_restarts_total{model="tuned"} 0.0' in page


async def test_sleeping_engine_gets_no_requests(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        before = list(sleeping.park.double.calls)
        assert (await client.get("/metrics")).status_code == 200
        await asyncio.sleep(3 * IDLE_S)
        assert sleeping.park.double.calls == before


async def test_engine_is_verified_before_it_accepts_requests_again(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        since = len(sleeping.park.double.calls)
        assert await answer(client) == ONE
        asked = [path for path in sleeping.park.double.calls[since:] if path != "/health"]
        assert asked[:3] == ["/wake_up", "/v1/completions", "/v1/chat/completions"]


async def test_engine_sleeps_and_wakes_repeatedly(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        for _ in range(3):
            await asleep(client)
            assert await answer(client) == ONE
        assert len(sleeping.park.engines) == 1


async def test_engine_that_wakes_with_unexpected_weights_is_replaced(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        sleeping.park.double.wakes_with = "/models/other/merged"
        assert await answer(client) == ONE
        assert [engine.alive for engine in sleeping.park.engines] == [False, True]


async def test_engine_that_fails_to_enter_sleep_mode_is_stopped(sleeping: Home) -> None:
    sleeping.park.prepare = lambda double: setattr(double, "sleepless", True)
    async with sleeping.serving(f"{NAME}@1") as client:
        await ended(client, sleeping)
        assert await answer(client) == ONE


async def test_engine_that_fails_to_wake_is_replaced_by_a_new_engine(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        sleeping.park.double.wakeless = True
        assert await answer(client) == ONE
        assert [engine.alive for engine in sleeping.park.engines] == [False, True]
        page = (await client.get("/metrics")).text
    assert 'svc_engine_wake_seconds_count{model="tuned"} 1.0' in page


async def test_new_engine_starts_for_the_next_request_if_the_sleeping_engine_died(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        sleeping.park.engines[0].kill()
        assert await answer(client) == ONE
        assert [engine.alive for engine in sleeping.park.engines] == [False, True]


async def test_all_sleeping_engines_of_a_model_wake_up(sleeping: Home) -> None:
    sleeping.configure(serve={"idle_s": 2.0}, engine={"replicas": 2})  # the second engine starts after a second
    async with sleeping.serving(f"{NAME}@1") as client:
        await until(lambda: sleeping.park.alive == 2)
        await asleep(client, replicas=2)
        assert await answer(client) == ONE
        await until(lambda: sleeping.park.asleep == 0)
        assert (sleeping.park.alive, len(sleeping.park.engines)) == (2, 2)
        page = (await client.get("/metrics")).text
    assert 'svc_engine_wake_seconds_count{model="tuned"} 1.0' in page


async def test_one_of_several_engines_is_restarted_if_it_fails_to_wake(sleeping: Home) -> None:
    sleeping.configure(serve={"idle_s": 2.0}, engine={"replicas": 2})
    async with sleeping.serving(f"{NAME}@1") as client:
        await until(lambda: sleeping.park.alive == 2)
        await asleep(client, replicas=2)
        sleeping.park.engines[0].double.wakeless = True
        assert await answer(client) == ONE
        assert len(sleeping.park.engines) == 2  # the other engine woke, and gave the answer
        await until(lambda: sleeping.park.alive == 2)
        assert len(sleeping.park.engines) == 3


async def test_promotion_replaces_the_sleeping_engine_with_one_for_the_new_version(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        assert (await sleeping.promote(2)).outcome is SwapOutcome.SUCCEEDED
        assert await engines(client) == [("ready", False)]
        assert await answer(client) == (200, f"{NAME}@2", "2")
        assert [engine.alive for engine in sleeping.park.engines] == [False, True]
        assert "/collective_rpc" not in sleeping.park.engines[0].double.calls
        await asleep(client)
        assert await answer(client) == (200, f"{NAME}@2", "2")


async def test_engine_does_not_enter_sleep_mode_while_a_promotion_verifies_files(
    sleeping: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        sleeping.hash_slowly(monkeypatch, 4 * IDLE_S)
        assert (await sleeping.promote(2)).outcome is SwapOutcome.SUCCEEDED
        assert await answer(client) == (200, f"{NAME}@2", "2")
        assert len(sleeping.park.engines) == 1


async def test_no_engine_sleeps_after_a_promotion_of_a_sleeping_model(sleeping: Home) -> None:
    sleeping.configure(serve={"idle_s": 2.0}, engine={"replicas": 2})  # the second engine starts after a second
    async with sleeping.serving(f"{NAME}@1") as client:
        await until(lambda: sleeping.park.alive == 2)
        await asleep(client, replicas=2)
        assert (await sleeping.promote(2)).outcome is SwapOutcome.SUCCEEDED
        assert sleeping.park.asleep == 0
        assert (await sleeping.promote(3)).outcome is SwapOutcome.SUCCEEDED
        assert await answer(client) == (200, f"{NAME}@3", "3")
        assert not any("/collective_rpc" in engine.double.calls for engine in sleeping.park.engines[:2])


async def test_sleeping_engines_are_stopped_when_the_server_stops(sleeping: Home) -> None:
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
    assert sleeping.park.alive == 0


async def test_sleeping_engine_of_a_killed_server_is_stopped_by_the_next_server(make: Make) -> None:
    control = make()
    control.leaves = True
    async with control.run():
        await control.replica.sleep()
        await control.replica.leave()  # like a killed server
    orphan, control.leaves = control.park.left[0], False
    control.assemble()
    async with asyncio.timeout(5), control.run():
        await control.serves(target(1))
        assert not orphan.alive
        assert (control.park.ended, control.park.alive) == ([0], 1)


async def test_adapters_are_reloaded_and_verified_again_after_waking(make: Make) -> None:
    async with make(format=Format.ADAPTER, adapters=AdapterSettings(max_loaded=2)).run() as control:
        version_one = target(1, Format.ADAPTER)
        await control.replica.sleep()
        assert control.replica.adapters is None
        await control.replica.wake(version_one)
        assert control.double.calls.count("/v1/load_lora_adapter") == 2
        assert len(control.double.adapters) == 1
        assert control.state is EngineState.READY


async def test_no_engine_sleeps_or_wakes_while_another_engine_starts(sleeping: Home) -> None:
    """vLLM measures free memory when it starts and falls asleep, and fails if another engine changes it."""
    make_version(sleeping.registry, 7, name=OTHER)
    sleeping.configure(models={NAME: {"idle_s": IDLE_S}})
    park = sleeping.park
    async with sleeping.serving(f"{NAME}@1") as client:
        first, park.start_delay_s = park.double, 1.5
        first.proceed.clear()  # a running answer keeps it awake until the server has added the other model
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
    """Return a home with three models on a GPU with memory for one awake and two sleeping engines."""
    make_version(sleeping.registry, 7, name=OTHER)
    make_version(sleeping.registry, 9, name="third")
    sleeping.configure(serve={"idle_s": 60})
    sleeping.park.shortage = lambda more: _full(sleeping, more, beside=2)
    return sleeping


def _full(home: Home, more: int, *, beside: int) -> str | None:
    """Return a memory shortage, unless enough memory for the waking engine is already free."""
    awake = home.park.alive - home.park.asleep
    return "full" if awake + more > 1 or home.park.asleep > beside else None


def serve(home: Home, name: str, number: int) -> None:
    change_desired(home.store, None, Target(VersionId(name, number), Format.MERGED), None)
    add_deployment(home.store, name)


async def test_two_models_can_alternate_if_memory_suffices_for_only_one_awake_model(crowded: Home) -> None:
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


async def test_sleeping_engines_are_stopped_when_their_memory_is_needed(crowded: Home) -> None:
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
        assert await engines(client) == [("idle", False)]  # the one that has been idle longest
        assert await engines(client, OTHER) == [("idle", True)]


async def test_waking_model_does_not_stop_itself_to_free_memory(sleeping: Home) -> None:
    sleeping.park.room = "full"
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        assert await answer(client) == ONE
        assert len(sleeping.park.engines) == 1


async def test_stopping_an_engine_that_fails_to_wake_is_retried_before_a_new_engine_starts(
    sleeping: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_end_once(monkeypatch)
    async with sleeping.serving(f"{NAME}@1") as client:
        await asleep(client)
        sleeping.park.double.wakeless = True
        assert await answer(client) == ONE
        assert [engine.alive for engine in sleeping.park.engines] == [False, True]
