"""Tests requests waiting for adapters: outside admission, limited in number, and never lost."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from svc.settings.engine import AdapterSettings
from svc.settings.serve import SwapChoice
from svc.store.desired import change_desired
from svc.store.swaps import SwapOutcome
from svc.version import Format
from tests.builders.adapters import BOTH, adapter, ask, numbers, versions
from tests.serving.control import BODY, Control, Make, until
from tests.serving.home import Home
from tests.serving.keyed import principal
from tests.serving.versions import NAME, make_version

pytestmark = pytest.mark.slow

Answers = list[tuple[int, str, str]]


def made(make: Make, **settings: Any) -> Control:
    """Return a server with version 1 in production as an adapter, which loads at most two of versions 1 to 8."""
    control = make(**{"format": Format.ADAPTER, "adapters": AdapterSettings(max_loaded=2)} | settings)
    versions(control, *range(4, 9))
    return control


async def occupied(control: Control, client: httpx.AsyncClient) -> list[asyncio.Task[tuple[int, str, str]]]:
    """Keep all adapter places in use by versions 1 and 2 until the double's `proceed` is set."""
    assert await ask(client, f"{NAME}@2") == (200, f"{NAME}@2", "2")
    control.double.proceed.clear()
    tasks = [asyncio.create_task(ask(client, model)) for model in (NAME, f"{NAME}@2")]
    await until(lambda: control.double.running == 2)
    return tasks


def asking(client: httpx.AsyncClient, models: Sequence[int]) -> list[asyncio.Task[tuple[int, str, str]]]:
    return [asyncio.create_task(ask(client, f"{NAME}@{number}")) for number in models]


async def test_production_requests_are_answered_while_300_requests_wait_for_other_adapters(make: Make) -> None:
    control = made(make, max_running=4)
    async with control.run(), control.client() as client:
        running = await occupied(control, client)
        others = asking(client, [3 + number % 6 for number in range(300)])
        await until(lambda: control.admission.queued == 128 and sum(task.done() for task in others) == 172)
        assert control.admission.running == 2
        production = asyncio.create_task(ask(client, NAME))
        await until(lambda: control.double.running == 3)
        control.double.proceed.set()
        assert await production == (200, f"{NAME}@1", "1")
        assert [status for status, _, _ in await asyncio.gather(*running)] == [200, 200]
        counts = Counter((status, text if status != 200 else "") for status, _, text in await asyncio.gather(*others))
    assert counts == {(200, ""): 128, (429, "overloaded"): 172}
    assert (control.double.dropped_in_use, control.double.most_adapters) == ([], 2)
    assert (control.admission.running, control.admission.queued) == (0, 0)


async def test_evicted_production_adapter_is_reloaded_before_other_waiting_adapters(make: Make) -> None:
    control = made(make)
    async with control.run(), control.client() as client:
        for number in (2, 3):  # replaces version 1
            await ask(client, f"{NAME}@{number}")
        control.double.proceed.clear()
        running = asking(client, [2, 3])
        await until(lambda: control.double.running == 2)
        others = asking(client, [4, 5, 6] * 50)
        await until(lambda: control.admission.queued == 128)
        production = asyncio.create_task(ask(client, NAME))
        await until(lambda: control.admission.queued == 129)
        before = len(control.double.adapter_loads)
        control.double.proceed.set()
        assert await production == (200, f"{NAME}@1", "1")
        await asyncio.gather(*running, *others)
    assert "/1/adapter" in control.double.adapter_loads[before]


async def test_request_waits_for_an_engine_slot_after_its_adapter_is_loaded(make: Make) -> None:
    control = made(make, max_running=2)
    async with control.run(), control.client() as client:
        running = await occupied(control, client)
        others = asking(client, [3] * 20)
        await until(lambda: control.admission.queued == 20)
        control.double.proceed.set()
        assert set(await asyncio.gather(*others)) == {(200, f"{NAME}@3", "3")}
        await asyncio.gather(*running)


async def test_adapter_stays_loaded_while_its_request_waits_for_a_slot(make: Make) -> None:
    control = made(make, max_running=1)
    async with control.run(), control.client() as client:
        control.double.proceed.clear()
        production = asyncio.create_task(ask(client, NAME))
        await until(lambda: control.double.running)
        second = asyncio.create_task(ask(client, f"{NAME}@2"))
        await until(lambda: len(control.admission.queue) == 1)
        third = asyncio.create_task(ask(client, f"{NAME}@3"))
        await until(lambda: control.admission.queued == 2)
        await asyncio.sleep(0.05)
        assert numbers(control.double) == [1, 2]
        control.double.proceed.set()
        assert await second == (200, f"{NAME}@2", "2")
        assert await third == (200, f"{NAME}@3", "3")
        await production
    assert len(control.double.adapter_loads) == 3


async def test_second_key_gets_adapter_slots_while_the_first_key_floods_the_queue(make: Make) -> None:
    control = made(make, max_queued=8)
    control.principals = {name: principal(name) for name in ("flooding", "modest")}
    async with control.run(), control.client() as client:

        def by(key: str, number: int) -> asyncio.Task[httpx.Response]:
            return asyncio.create_task(
                client.post(
                    "/v1/chat/completions",
                    json=BODY | {"model": f"{NAME}@{number}"},
                    headers={"authorization": f"Bearer {key}"},
                )
            )

        running = await occupied(control, client)
        flood = [by("flooding", number) for number in (3, 4, 5, 6)]
        await until(lambda: control.admission.queued == 4)  # requests of other connections may overtake each other
        flood += [by("flooding", 3 + number % 4) for number in range(36)]
        await until(lambda: sum(task.done() for task in flood) == 36)
        modest = [by("modest", number) for number in (7, 8)]
        await until(lambda: control.admission.queued == 6)
        before = len(control.double.adapter_loads)
        control.double.proceed.set()
        assert [(await task).status_code for task in modest] == [200, 200]
        refused = [answer for task in flood if (answer := await task).status_code != 200]
        await asyncio.gather(*running)
    assert {(each.status_code, each.json()["error"]["code"]) for each in refused} == {(429, "overloaded")}
    assert len(refused) == 36 and "of them from flooding" in refused[0].text
    loads = [folder.split("/")[-2] for folder in control.double.adapter_loads[before:]]
    assert [set(loads[:4]), set(loads[4:])] == [{"3", "4", "5", "6"}, {"7", "8"}]


@pytest.mark.parametrize("swap", [SwapChoice.AUTO, SwapChoice.BLUEGREEN])
async def test_swap_loses_no_request_waiting_for_an_adapter(make: Make, swap: SwapChoice) -> None:
    control = made(make, swap=swap, adapters=AdapterSettings(max_loaded=3))
    async with control.run(), control.client() as client:
        first = control.double
        await occupied(control, client)
        running = asking(client, [3])
        await until(lambda: first.running == 3)
        others = asking(client, [4, 5, 6, 7] * 5)
        production = asyncio.create_task(ask(client, f"{NAME}@production"))
        await until(lambda: control.admission.queued >= 20)
        wish = control.wish(8)
        await asyncio.sleep(0.1)
        first.proceed.set()
        assert (await control.outcome(wish)).outcome is SwapOutcome.SUCCEEDED
        answers = await asyncio.gather(*others)
        await asyncio.gather(*running, production)
        assert await ask(client, NAME) == (200, f"{NAME}@8", "8")
    assert answers == [(200, f"{NAME}@{number}", str(number)) for number in [4, 5, 6, 7] * 5]
    assert first.dropped_in_use == []


async def test_requests_waiting_for_adapters_move_to_a_live_engine_if_their_engine_dies(make: Make) -> None:
    async with made(make, replicas=2).run() as control, control.client() as client:
        await until(lambda: len(control.pool.ready) == 2)
        engines = [engine.double for engine in control.park.engines]
        for double in engines:
            double.proceed.clear()
        running = asking(client, [1, 2, 3, 4])
        await until(lambda: sum(double.running for double in engines) == 4)
        others = asking(client, [5, 6, 7, 8] * 3)
        await until(lambda: control.admission.queued == 12)
        assert all(member.reserved for member in control.pool.members)
        engines[0].die()
        engines[1].proceed.set()
        assert await asyncio.gather(*others) == [(200, f"{NAME}@{number}", str(number)) for number in [5, 6, 7, 8] * 3]
        await asyncio.gather(*running)
        assert not any(member.reserved for member in control.pool.members)


async def test_reservations_are_released_if_clients_disconnect_while_waiting_for_adapters(make: Make) -> None:
    control = made(make)
    async with control.run(), control.client() as client:
        running = await occupied(control, client)
        others = asking(client, [3, 4] * 5)
        await until(lambda: control.admission.queued == 10)
        for task in others:
            task.cancel()
        await until(lambda: control.admission.queued == 0)
        assert control.pool.members[0].reserved == 0
        control.double.proceed.set()
        await asyncio.gather(*running)
        assert await ask(client, f"{NAME}@3") == (200, f"{NAME}@3", "3")


async def test_requests_for_adapters_wake_a_sleeping_engine_and_keep_it_awake(home: Home) -> None:
    for number in (4, 5, 6, 7):
        make_version(home.registry, number, formats=BOTH)
    change_desired(home.store, None, adapter(4), None)
    home.settings = home.settings.model_validate(
        {
            "home": home.settings.home,
            "serve": {"port": 0, "idle_s": 0.3, "max_running": 1},
            "adapters": {"max_loaded": 2},
        }
    )
    async with home.serving(NAME) as client:
        async with asyncio.timeout(5):
            while (await client.get("/svc/status")).json()["models"][0]["engine"]["state"] != "idle":
                await asyncio.sleep(0.01)
        home.park.prepare = lambda double: setattr(double, "adapter_delay_s", 0.4)
        answers = await asyncio.gather(*asking(client, [5, 6, 7] * 3))
        assert answers == [(200, f"{NAME}@{number}", str(number)) for number in [5, 6, 7] * 3]
        assert len(home.park.engines) == 2  # it did not fall asleep while adapters were loaded
