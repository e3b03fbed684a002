"""Tests requests to fine-tuned models that were not promoted: who may use them, and which engine answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from serving.access.keyring import IssuedKey
from serving.fine_tuning.rows import JobCheckpoint, add_checkpoint
from serving.models import fine_tuned_models
from serving.models.checkpoint_versions import checkpoint_version
from serving.models.fine_tuned_rows import FineTunedModel, find_model
from svc.identity.principal import Scope
from svc.registry.housekeeping import remove_version
from svc.settings.client_apis import FineTuningSettings
from svc.store.deployments import add_deployment, deployed_names
from svc.store.desired import change_desired, read_desired
from svc.version import Alias, Format, Target, VersionId
from tests.builders.keys import make_key
from tests.serving.control import BODY, until
from tests.serving.engine_park import ParkSlots
from tests.serving.home import Home
from tests.serving.trained import add_job, train
from tests.serving.versions import base_folder, make_version

pytestmark = pytest.mark.slow

BOTH = (Format.MERGED, Format.ADAPTER)
BASE = VersionId("served", 4)
"""Version in production, which is served as an adapter."""
Client = httpx.AsyncClient


@pytest.fixture
def served(home: Home) -> Home:
    """Return a home whose server serves one model as an adapter of the base that jobs train."""
    make_version(home.registry, BASE.number, name=BASE.name, formats=BOTH)
    change_desired(home.store, None, Target(BASE, Format.ADAPTER), None)
    return home


@asynccontextmanager
async def serving(home: Home, *keys: IssuedKey) -> AsyncIterator[tuple[Client, ...]]:
    """Run the server, and yield a client for each key."""
    async with home.serving(BASE.name) as client:
        clients = [
            Client(base_url=client.base_url, timeout=10, headers={"authorization": f"Bearer {each.secret}"})
            for each in keys
        ]
        try:
            yield tuple(clients) or (client,)
        finally:
            for each in clients:
                await each.aclose()


async def ask(client: Client, model: str) -> tuple[int, str, str]:
    """Return the response status, the version in the header, and the number in the text or the error code."""
    content = json.dumps(BODY | {"model": model})  # in ASCII, so that surrogates can be sent
    headers = {"content-type": "application/json"}
    answer = await client.post("/v1/chat/completions", content=content, headers=headers)
    body = answer.json()
    text = body["error"]["code"] if "error" in body else body["choices"][0]["message"]["content"].partition(".")[0]
    return answer.status_code, answer.headers.get("x-model-version", ""), text


async def message(client: Client, model: str) -> str:
    """Return the error message for a model, in which the model's name is replaced."""
    answer = await client.post("/v1/chat/completions", json=BODY | {"model": model})
    assert answer.status_code == 404
    text: str = answer.json()["error"]["message"]
    return text.replace(model, "MODEL")


async def listed(client: Client) -> list[str]:
    return [model["id"] for model in (await client.get("/v1/models")).json()["data"]]


async def test_owner_can_use_a_fine_tuned_model_by_both_of_its_names_when_its_base_is_served(served: Home) -> None:
    alice = make_key(served)
    model = train(served.store, served.registry, owner=alice.key.id, number=7)
    async with serving(served, alice) as (client,):
        for name in (model.name, str(model.version)):
            assert await ask(client, name) == (200, str(model.version), "7")
        assert await ask(client, BASE.name) == (200, str(BASE), "4")
        counted = await client.post("/tokenize", json=BODY | {"model": model.name})
        assert counted.headers["x-model-version"] == str(model.version)
    assert len(served.park.engines) == 1


async def test_model_trained_while_the_server_runs_is_usable_without_a_restart(served: Home) -> None:
    async with serving(served) as (client,):
        model = train(served.store, served.registry)
        assert await ask(client, model.name) == (200, str(model.version), "1")


async def test_model_of_another_owner_gives_the_same_error_as_an_unknown_model(served: Home) -> None:
    alice, bob = make_key(served), make_key(served)
    model = train(served.store, served.registry, owner=alice.key.id)
    async with serving(served, alice, bob) as (of_alice, of_bob):
        for _ in range(2):
            for name, unknown in (
                (model.name, "ft:small:org::1"),
                (str(model.version), f"ft-{alice.key.id}-y@1"),
                (model.version.name, "unknown"),
            ):
                assert await message(of_bob, name) == await message(of_bob, unknown)
            assert (await ask(of_alice, model.name))[0] == 200  # it is loaded in the second turn
        assert await listed(of_bob) == [BASE.name, str(BASE), f"{BASE.name}@production"]


async def test_fine_tuned_model_is_usable_with_an_admin_key_or_a_key_that_lists_the_model(served: Home) -> None:
    alice = make_key(served)
    model = train(served.store, served.registry, owner=alice.key.id)
    admin, listed_key = make_key(served, Scope.ADMIN), make_key(served, models=[model.version.name])
    async with serving(served, admin, listed_key) as clients:
        for client in clients:
            assert (await ask(client, model.name))[0] == 200


async def test_owner_can_use_a_fine_tuned_model_even_if_the_owners_key_is_restricted_to_other_models(
    served: Home,
) -> None:
    alice = make_key(served, models=[BASE.name])
    model = train(served.store, served.registry, owner=alice.key.id)
    async with serving(served, alice) as (client,):
        assert (await ask(client, model.name))[::2] == (200, "1")


async def test_served_model_trained_by_a_job_is_visible_only_to_the_jobs_owner(home: Home) -> None:
    alice, bob = make_key(home), make_key(home)
    model = train(home.store, home.registry, owner=alice.key.id)
    async with home.serving(str(model.version)) as client:
        for issued, status in ((alice, 200), (bob, 404)):
            client.headers["authorization"] = f"Bearer {issued.secret}"
            for name in (model.name, str(model.version), model.version.name):
                answer = await client.post("/v1/chat/completions", json=BODY | {"model": name})
                assert answer.status_code == status
                shown = await client.get(f"/v1/models/{name}") if not name.startswith("ft:") else answer
                assert shown.status_code == status
        assert await listed(client) == []
        assert "x-model-version" not in (await client.get("/v1/models")).headers


@pytest.mark.parametrize("adapter", [{"r": 64}, {"base_model_name_or_path": "other"}])
async def test_second_engine_is_started_when_the_served_base_cannot_apply_the_adapter(
    served: Home, adapter: dict[str, Any]
) -> None:
    if "base_model_name_or_path" in adapter:
        folder = served.settings.home / "other"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        adapter = {"base_model_name_or_path": str(folder)}
    model = train(served.store, served.registry, adapter=adapter)
    async with serving(served) as (client,):
        assert await ask(client, model.name) == (200, str(model.version), "1")
        assert (await ask(client, BASE.name))[0] == 200
    assert len(served.park.engines) == 2


@pytest.mark.parametrize(
    "name", ["ft:", "ft:small:org::1", "ft:a\0b", "ft:\ud800", "ft:" + "x" * 9999, "ft-x@1", "ft-"]
)
async def test_request_for_an_unknown_fine_tuned_model_returns_not_found(served: Home, name: str) -> None:
    async with serving(served) as (client,):
        assert (await ask(client, name))[0] == 404


async def test_repeated_requests_for_a_fine_tuned_model_look_it_up_in_the_store_only_once(
    served: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = list[str]()

    def counting(store: Any, name: str) -> FineTunedModel | None:
        reads.append(name)
        return find_model(store, name)

    monkeypatch.setattr(fine_tuned_models, "find_model", counting)
    model = train(served.store, served.registry)
    async with serving(served) as (client,):
        for _ in range(5):
            assert (await ask(client, model.name))[0] == 200
            assert (await ask(client, BASE.name))[0] == 200
    assert reads == [model.name]


async def test_loaded_model_is_unloaded_when_its_version_is_removed(
    served: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engines.removed_adapters._POLL_S", 0.01)
    model = train(served.store, served.registry)

    def loaded() -> list[str]:
        return [name for name in served.park.double.adapters if name.startswith(model.version.name)]

    async with serving(served) as (client,):
        assert (await ask(client, model.name))[0] == 200
        await asyncio.sleep(0.1)  # the engine's adapters have been compared with the registry
        assert loaded()
        remove_version(served.registry, served.store, model.version)
        await until(lambda: not loaded())
        assert (await ask(client, model.name))[0] == 404


@pytest.fixture
def merged(served: Home) -> Home:
    """Return a home whose server has no engine for adapters, so that an engine is started for each base."""
    desired = read_desired(served.store, BASE.name)
    change_desired(served.store, desired, Target(BASE, Format.MERGED), None)
    return served


def tuning(home: Home, **settings: Any) -> None:
    home.settings = home.settings.model_copy(update={"fine_tuning": FineTuningSettings(**settings)})


async def test_fine_tuned_models_of_the_same_base_share_one_engine(merged: Home) -> None:
    alice, bob = make_key(merged), make_key(merged)
    first = train(merged.store, merged.registry, owner=alice.key.id, number=5)
    second = train(merged.store, merged.registry, owner=bob.key.id, number=6)
    async with serving(merged, alice, bob) as (of_alice, of_bob):
        assert await ask(of_alice, first.name) == (200, str(first.version), "5")
        assert merged.park.double.weights == str(base_folder(merged.registry))
        assert await ask(of_bob, second.name) == (200, str(second.version), "6")
        refused = await of_bob.post("/v1/chat/completions", json=BODY | {"model": second.name, "n": 300})
        assert (refused.status_code, refused.headers["x-model-version"]) == (400, str(second.version))
        assert (await ask(of_bob, first.name))[0] == 404
        assert (await ask(of_alice, second.name))[0] == 404
        assert await ask(of_bob, BASE.name) == (200, str(BASE), "4")
    assert len(merged.park.engines) == 2


async def test_engine_for_a_fine_tuned_model_is_started_once_for_concurrent_requests(merged: Home) -> None:
    merged.park.start_delay_s = 0.1
    models = [train(merged.store, merged.registry, number=number) for number in (5, 6)]
    async with serving(merged) as (client,):
        answers = await asyncio.gather(*(ask(client, model.name) for model in models * 3))
    assert [answer[2] for answer in answers] == ["5", "6"] * 3
    assert len(merged.park.engines) == 2


async def test_model_loaded_on_demand_is_not_promoted_and_not_loaded_after_a_restart(merged: Home) -> None:
    model = train(merged.store, merged.registry)
    async with serving(merged) as (client,):
        assert (await ask(client, model.name))[0] == 200
        assert deployed_names(merged.store) == [BASE.name]
        assert read_desired(merged.store, model.version.name) is None
    assert Alias.PRODUCTION not in merged.book.aliases(model.version.name)
    async with merged.serving() as client:
        assert await listed(client) == [BASE.name, str(BASE), f"{BASE.name}@production", model.name]


async def test_model_is_unloaded_when_idle_and_loaded_again_for_the_next_request(merged: Home) -> None:
    tuning(merged, idle_s=0.05)
    model = train(merged.store, merged.registry)
    async with serving(merged) as (client,):
        for _ in range(2):
            before = len(merged.park.engines)
            assert (await ask(client, model.name))[0] == 200
            assert len(merged.park.engines) > before
            await until(lambda: merged.park.alive == 1)
            async with asyncio.timeout(5):
                while model.version.name in (await client.get("/svc/status")).text:
                    await asyncio.sleep(0.05)


async def test_model_loaded_on_demand_stays_loaded_once_an_operator_adds_it(merged: Home) -> None:
    tuning(merged, idle_s=0.3)
    model = train(merged.store, merged.registry)
    async with serving(merged) as (client,):
        assert (await ask(client, model.name))[0] == 200
        change_desired(merged.store, None, Target(model.version, Format.ADAPTER), None)
        add_deployment(merged.store, model.version.name)
        await asyncio.sleep(1.5)  # the server has read the store
        await until(lambda: merged.park.alive == 2)
        await asyncio.sleep(0.5)
        assert merged.park.alive == 2


@pytest.mark.parametrize("memory", [True, False])
async def test_if_a_model_cannot_be_loaded_the_error_suggests_svc_add_and_the_next_request_tries_again(
    merged: Home, memory: bool
) -> None:
    model = train(merged.store, merged.registry)
    async with serving(merged) as (client,):
        if memory:
            merged.park.failing_starts = 1
        else:
            merged.park.room = "it needs 9 GiB"
        answer = await client.post("/v1/chat/completions", json=BODY | {"model": model.name})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "20")
        assert f"svc add {model.version}" in answer.json()["error"]["message"]
        assert merged.park.alive == 1
        merged.park.room = None
        assert (await ask(client, model.name))[0] == 200


async def test_request_gets_503_if_its_model_loads_too_slowly_but_a_later_request_succeeds(merged: Home) -> None:
    merged.settings = merged.settings.model_copy(
        update={"serve": merged.settings.serve.model_copy(update={"queue_timeout_s": 0.1})}
    )
    model = train(merged.store, merged.registry)
    async with serving(merged) as (client,):
        merged.park.start_delay_s = 0.5
        assert (await ask(client, model.name))[::2] == (503, "engine_unavailable")
        async with asyncio.timeout(5):
            while (await ask(client, model.name))[0] != 200:
                await asyncio.sleep(0.05)
    assert len(merged.park.engines) == 2


async def test_merged_version_replaces_an_unused_version_of_the_same_model(merged: Home) -> None:
    models = [train(merged.store, merged.registry, number=number, formats=(Format.MERGED,)) for number in (5, 6)]
    async with serving(merged) as (client,):
        for model in (*models, models[0]):
            assert await ask(client, model.name) == (200, str(model.version), str(model.version.number))
        assert merged.park.alive == 2


async def test_smaller_format_is_loaded_when_memory_is_too_small_for_the_base_of_the_adapter(
    merged: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train(merged.store, merged.registry, formats=(Format.ADAPTER, Format.MERGED, Format.GPTQ))

    async def shortage(self: ParkSlots, engines: Mapping[Target, int]) -> str | None:
        return "no room" if any(target.format is not Format.GPTQ for target in engines) else None

    async with serving(merged) as (client,):
        monkeypatch.setattr(ParkSlots, "shortage", shortage)
        assert (await ask(client, model.name))[0] == 200
    assert merged.park.double.weights.endswith("/gptq")


async def test_request_for_a_fine_tuned_model_without_a_version_returns_not_found(merged: Home) -> None:
    model = train(merged.store, merged.registry)
    remove_version(merged.registry, merged.store, model.version)
    async with serving(merged) as (client,):
        assert (await ask(client, model.name))[0] == 404


async def test_checkpoint_can_be_used_only_by_its_owner(merged: Home) -> None:
    alice, bob = make_key(merged), make_key(merged)
    job = add_job(merged.store, owner=alice.key.id)
    version, name = checkpoint_version(job.id, 20), f"{job.fine_tuned_model}:ckpt-step-20"
    make_version(merged.registry, 20, name=version.name, formats=(Format.ADAPTER,))
    add_checkpoint(merged.store, JobCheckpoint("ftckpt_1", job.id, datetime.now(UTC), 20, name, "{}"))
    async with serving(merged, alice, bob) as (of_alice, of_bob):
        assert await ask(of_alice, name) == (200, str(version), "20")
        for model in (name, str(version), version.name):
            assert (await ask(of_bob, model))[0] == 404
        assert version.name not in str(await listed(of_bob))
        assert (await of_alice.delete(f"/v1/models/{name}")).status_code == 200
        assert (await ask(of_alice, name))[0] == 404
