"""Tests removing a version while its adapter is loaded: new requests fail, and running requests complete."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from svc.errors import BusyError
from svc.registry.housekeeping import remove_version
from svc.registry.registry import Registry
from svc.store.desired import change_desired
from svc.store.swaps import SwapOutcome
from svc.version import Format, VersionId
from tests.builders.adapters import adapter, ask, numbers
from tests.serving.control import BODY, Control, Make, until
from tests.serving.home import Home
from tests.serving.versions import NAME, make_version

pytestmark = pytest.mark.slow

TWO = VersionId(NAME, 2)
GONE = (404, "model_not_found")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engines.removed_adapters._POLL_S", 0.01)


@pytest.fixture
async def served(make: Make) -> AsyncIterator[Control]:
    """Yield a server with version 1 in production as an adapter."""
    async with make(format=Format.ADAPTER).run() as control:
        yield control


def remove(control: Control, version: VersionId = TWO) -> None:
    remove_version(control.registry, control.store, version)


def loaded(control: Control) -> list[VersionId]:
    adapters = control.replica.adapters
    return [each.version for each in adapters.loaded] if adapters else []


async def gone(control: Control) -> None:
    await until(lambda: TWO not in loaded(control))


async def listed(client: httpx.AsyncClient) -> list[str]:
    return [model["id"] for model in (await client.get("/v1/models")).json()["data"]]


async def test_removed_version_is_neither_served_nor_listed(served: Control) -> None:
    async with served.client() as client:
        assert await ask(client, str(TWO)) == (200, str(TWO), "2")
        remove(served)
        await gone(served)
        assert (await ask(client, str(TWO)))[::2] == GONE
        assert str(TWO) not in await listed(client)
        assert (await client.get(f"/v1/models/{TWO}")).status_code == 404
        assert await ask(client, NAME) == (200, f"{NAME}@1", "1")
    assert served.sample("svc_adapters_loaded", model=NAME) == 1


async def test_adapter_is_evicted_when_its_version_is_removed(served: Control) -> None:
    async with served.client() as client:
        await ask(client, str(TWO))
        assert numbers(served.double) == [1, 2]
        remove(served)
        await until(lambda: numbers(served.double) == [1])


async def test_running_request_completes_when_its_version_is_removed(served: Control) -> None:
    async with served.client() as client:
        await ask(client, str(TWO))
        served.double.token_delay_s = 0.05
        running = asyncio.create_task(ask(client, str(TWO), stream=False))
        await until(lambda: served.double.running)
        remove(served)
        await gone(served)
        assert (await ask(client, str(TWO)))[::2] == GONE
        assert not running.done()
        assert await running == (200, str(TWO), "2")
    assert served.double.dropped_in_use == []


async def test_version_removed_during_its_load_is_not_found(served: Control) -> None:
    files, checking, removed = Registry.verify, asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(registry: Registry, version: VersionId, format: Format) -> None:
        if version == TWO:
            loop.call_soon_threadsafe(checking.set)
            asyncio.run_coroutine_threadsafe(removed.wait(), loop).result()
        files(registry, version, format)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registry, "verify", slow)
        async with served.client() as client:
            asking = asyncio.create_task(ask(client, str(TWO)))
            await checking.wait()
            await asyncio.to_thread(remove, served)
            removed.set()
            assert (await asking)[::2] == GONE


async def test_clients_get_only_answers_or_not_found_while_a_version_is_removed(served: Control) -> None:
    results = set[tuple[int | str, ...]]()

    async def ask_on(client: httpx.AsyncClient) -> None:
        while GONE not in results:
            results.add((await ask(client, str(TWO), stream=False))[::2])

    async with served.client() as client, asyncio.timeout(10):
        asking = [asyncio.create_task(ask_on(client)) for _ in range(8)]
        await until(lambda: results)
        await asyncio.to_thread(remove, served)
        await asyncio.gather(*asking)
    assert results == {(200, "2"), GONE}


async def test_production_and_previous_versions_are_not_removed(served: Control) -> None:
    assert (await served.promote(2)).outcome is SwapOutcome.SUCCEEDED
    for number in (1, 2):
        with pytest.raises(BusyError):
            remove(served, VersionId(NAME, number))
    assert loaded(served) == [VersionId(NAME, 1), TWO]


async def test_production_version_keeps_serving_if_its_files_are_lost(served: Control) -> None:
    async with served.client() as client:
        await ask(client, str(TWO))
        served.registry.models.rename(served.settings.home / "elsewhere")
        await gone(served)
        assert await ask(client, NAME) == (200, f"{NAME}@1", "1")


async def test_adapters_stay_loaded_if_the_registry_is_unreadable(
    served: Control, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(registry: Registry, name: str | None = None) -> list[VersionId]:
        raise OSError("stale handle")

    async with served.client() as client:
        await ask(client, str(TWO))
        with monkeypatch.context() as patch:
            patch.setattr(Registry, "versions", unreadable)
            await until(lambda: "could not unload the adapters of removed versions" in caplog.text)
            assert await ask(client, str(TWO)) == (200, str(TWO), "2")
        remove(served)
        await gone(served)


async def test_each_of_several_engines_evicts_the_removed_adapter(make: Make) -> None:
    async with make(format=Format.ADAPTER, replicas=2).run() as control, control.client() as client:
        await until(lambda: len(control.pool.ready) == 2)
        for member in control.pool.members:
            assert member.adapters
            async with member.adapters.use(TWO):
                pass
        remove(control)
        await until(lambda: all(numbers(engine.double) == [1] for engine in control.park.engines))
        assert (await ask(client, str(TWO)))[::2] == GONE


async def test_running_server_evicts_the_adapter_of_a_removed_version(home: Home) -> None:
    for number in (4, 5):
        make_version(home.registry, number, formats=(Format.MERGED, Format.ADAPTER))
    change_desired(home.store, None, adapter(4), None)
    five = VersionId(NAME, 5)
    async with home.serving(NAME) as client:
        assert await ask(client, str(five)) == (200, str(five), "5")
        remove_version(home.registry, home.store, five)
        async with asyncio.timeout(5):
            while (answer := await client.post("/v1/chat/completions", json=BODY | {"model": str(five)})).is_success:
                await asyncio.sleep(0.01)
        (status,) = (await client.get("/svc/status")).json()["models"]
    assert (answer.status_code, json.loads(answer.content)["error"]["code"]) == GONE
    assert [adapter["version"] for adapter in status["engines"][0]["adapters"]] == [f"{NAME}@4"]
