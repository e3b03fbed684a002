"""Tests that idle engines stop and start again for the next request, which waits and is not rejected."""

import asyncio

import httpx
import pytest

from serving.rollout.promotion import PromotionRequest
from serving.rollout.version_changes import VersionChanges
from svc.identity.actor import Actor
from svc.settings.rollout import RolloutSettings
from svc.settings.settings import ModelSettings
from svc.store.deployments import add_deployment
from svc.store.desired import change_desired
from svc.store.rollouts import RolloutState, find_rollout
from svc.store.swaps import SwapKind, SwapOutcome, find_swap
from svc.version import Format, Target, VersionId
from tests.serving.control import BODY, until
from tests.serving.engine_park import fail_to_end_once
from tests.serving.home import Home
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow

OTHER = "other"
IDLE_S = 0.2


@pytest.fixture
def idling(home: Home) -> Home:
    """Return a home with two models that become idle quickly."""
    for number in (7, 8):
        make_version(home.registry, number, name=OTHER)
    home.configure(serve={"idle_s": IDLE_S})
    return home


async def answer(client: httpx.AsyncClient, model: str = NAME) -> tuple[int, str]:
    """Return the response status and the version in the header."""
    response = await client.post("/v1/chat/completions", json=BODY | {"model": model})
    return response.status_code, response.headers.get("x-model-version", "")


async def states(client: httpx.AsyncClient) -> dict[str, str]:
    models = (await client.get("/svc/status")).json()["models"]
    return {model["model"]: model["engine"]["state"] for model in models}


async def become(client: httpx.AsyncClient, **wanted: str) -> None:
    """Wait until the models have these states."""
    async with asyncio.timeout(5):
        while await states(client) != wanted:
            await asyncio.sleep(0.01)


async def test_engine_is_stopped_if_no_request_arrives_within_the_idle_timeout(idling: Home) -> None:
    async with idling.serving(f"{NAME}@1") as client:
        await become(client, tuned="idle")
        assert idling.park.alive == 0


async def test_requests_to_an_idle_model_are_answered_after_its_engine_starts_again(idling: Home) -> None:
    async with idling.serving(f"{NAME}@1") as client:
        await become(client, tuned="idle")
        idling.park.start_delay_s = 0.3
        assert await asyncio.gather(*(answer(client) for _ in range(5))) == [(200, f"{NAME}@1")] * 5
        assert idling.park.most_starting == 1
        page = (await client.get("/metrics")).text
    assert 'svc_engine_wake_seconds_count{model="tuned"} 1.0' in page
    assert 'svc_engine_restarts_total{model="tuned"} 0.0' in page
    assert 'svc_replicas_wanted{model="tuned"} 1.0' in page


async def test_idle_model_is_healthy_and_listed(idling: Home) -> None:
    async with idling.serving(f"{NAME}@1") as client:
        await become(client, tuned="idle")
        assert (await client.get("/health")).status_code == 200
        assert f"{NAME}@1" in {model["id"] for model in (await client.get("/v1/models")).json()["data"]}


async def test_request_by_version_number_wakes_the_model(idling: Home) -> None:
    async with idling.serving(f"{NAME}@1") as client:
        await become(client, tuned="idle")
        assert await answer(client, f"{NAME}@1") == (200, f"{NAME}@1")


async def test_model_does_not_idle_while_requests_arrive(idling: Home) -> None:
    async with idling.serving(f"{NAME}@1") as client:
        for _ in range(8):
            assert await answer(client) == (200, f"{NAME}@1")
            await asyncio.sleep(IDLE_S / 4)
        assert len(idling.park.engines) == 1


async def test_model_does_not_idle_while_an_answer_is_being_generated(idling: Home) -> None:
    async with idling.serving(f"{NAME}@1") as client:
        idling.park.double.token_delay_s = 2 * IDLE_S
        assert await answer(client) == (200, f"{NAME}@1")
        assert len(idling.park.engines) == 1


async def test_model_idles_and_wakes_repeatedly(idling: Home) -> None:
    async with idling.serving(f"{NAME}@1") as client:
        for _ in range(3):
            await become(client, tuned="idle")
            assert await answer(client) == (200, f"{NAME}@1")
        assert len(idling.park.engines) == 4


async def test_all_engines_of_an_idle_model_stop_and_restart_at_the_next_request(idling: Home) -> None:
    idling.configure(serve={"idle_s": 2.0}, engine={"replicas": 2})  # the second engine starts after a second
    async with idling.serving(f"{NAME}@1") as client:
        await until(lambda: idling.park.alive == 2)
        await become(client, tuned="idle")
        assert idling.park.alive == 0
        async with asyncio.timeout(5):
            while idling.park.alive < 2:
                assert await answer(client) == (200, f"{NAME}@1")


async def test_failed_wake_up_rejects_waiting_requests_and_is_retried(idling: Home) -> None:
    async with idling.serving(f"{NAME}@1") as client:
        await become(client, tuned="idle")
        idling.park.failing_starts = 1
        assert (await answer(client))[0] == 503
        async with asyncio.timeout(5):
            while (await answer(client))[0] != 200:
                await asyncio.sleep(0.01)


async def test_failed_attempt_to_stop_an_idle_engine_is_retried_before_the_next_startup(
    idling: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = fail_to_end_once(monkeypatch)
    async with idling.serving(f"{NAME}@1") as client:
        await become(client, tuned="idle")
        assert not failures
        assert await answer(client) == (200, f"{NAME}@1")
        assert idling.park.alive == 1
        await become(client, tuned="idle")


async def test_promotion_wakes_an_idle_model_with_the_new_version(idling: Home) -> None:
    async with idling.serving(f"{NAME}@1") as client:
        await become(client, tuned="idle")
        assert (await idling.promote(2)).outcome is SwapOutcome.SUCCEEDED
        assert await answer(client) == (200, f"{NAME}@2")
        await become(client, tuned="idle")
        assert await answer(client) == (200, f"{NAME}@2")


async def test_rollout_wakes_an_idle_model_with_the_production_version(idling: Home) -> None:
    plan = ModelSettings(rollout=RolloutSettings(shadow=5))
    async with idling.serving(f"{NAME}@1") as client:
        await become(client, tuned="idle")
        changes = VersionChanges(idling.registry, idling.store, lambda: {NAME: target(1)}, lambda name: plan)
        changes.promote(PromotionRequest(target(2).version), Actor.local())
        await until(lambda: (at := find_rollout(idling.store, NAME)) and at.state is RolloutState.SHADOW)
        assert await answer(client) == (200, f"{NAME}@1")


async def test_engine_does_not_idle_while_a_promotion_verifies_files(
    idling: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with idling.serving(f"{NAME}@1") as client:
        idling.hash_slowly(monkeypatch, 4 * IDLE_S)
        result = await idling.promote(2)
        assert (result.outcome, result.kind) == (SwapOutcome.SUCCEEDED, SwapKind.INPLACE)
        assert len(idling.park.engines) == 1
        assert await answer(client) == (200, f"{NAME}@2")
        await become(client, tuned="idle")


async def test_model_being_promoted_is_not_stopped_to_free_memory(
    idling: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    idling.configure(serve={"idle_s": 60})
    idling.park.room = "full"
    async with idling.serving(f"{NAME}@1") as client:
        await answer(client)
        idling.hash_slowly(monkeypatch, 2.0)
        promoting = asyncio.create_task(idling.promote(2))
        await until(lambda: find_swap(idling.store, NAME))
        change_desired(idling.store, None, Target(VersionId(OTHER, 7), Format.MERGED), None)
        add_deployment(idling.store, OTHER)
        async with asyncio.timeout(5):
            while not (await client.get("/svc/status")).json()["refused"]:
                await asyncio.sleep(0.01)
        assert not promoting.done()
        assert (await promoting).outcome is SwapOutcome.SUCCEEDED
        assert len(idling.park.engines) == 1


async def test_promotion_succeeds_after_a_previous_promotion_has_woken_several_engines(
    idling: Home,
) -> None:
    idling.configure(serve={"idle_s": 2.0}, engine={"replicas": 2})  # the second engine starts after a second
    async with idling.serving(f"{NAME}@1") as client:
        await until(lambda: idling.park.alive == 2)
        await become(client, tuned="idle")
        assert (await idling.promote(2)).outcome is SwapOutcome.SUCCEEDED
        assert (await idling.promote(3)).outcome is SwapOutcome.SUCCEEDED
        assert await answer(client) == (200, f"{NAME}@3")


async def test_idle_model_does_not_affect_other_models(idling: Home) -> None:
    idling.configure(models={OTHER: {"idle_s": IDLE_S}})
    async with idling.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        await become(client, tuned="ready", other="idle")
        assert await answer(client) == (200, f"{NAME}@1")
        assert await answer(client, OTHER) == (200, f"{OTHER}@7")


async def test_server_can_stop_while_a_model_is_idle_or_waking(idling: Home) -> None:
    async with idling.serving(f"{NAME}@1") as client:
        await become(client, tuned="idle")
        idling.park.start_delay_s = 10
        asking = asyncio.create_task(answer(client))
        await until(lambda: idling.park.starting)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert idling.park.alive == 0


async def test_longest_idle_model_is_stopped_if_memory_is_insufficient(idling: Home) -> None:
    make_version(idling.registry, 9, name="third")
    idling.configure(serve={"idle_s": 60})
    idling.park.shortage = lambda more: "full" if idling.park.alive + more > 2 else None
    async with idling.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        await become(client, tuned="ready", other="ready")
        await answer(client, OTHER)
        await asyncio.sleep(0.01)
        await answer(client, NAME)  # so that the other model has been idle longer
        change_desired(idling.store, None, Target(VersionId("third", 9), Format.MERGED), None)
        add_deployment(idling.store, "third")
        await become(client, tuned="ready", other="idle", third="ready")
        await answer(client, "third")
        assert await answer(client, OTHER) == (200, f"{OTHER}@7")
        await become(client, tuned="idle", other="ready", third="ready")


async def test_startup_and_wake_up_require_memory_for_only_the_first_replica(idling: Home) -> None:
    replicas = {"min": 1, "max": 3}
    idling.configure(serve={"idle_s": IDLE_S}, engine={"replicas": replicas})
    asked = list[int]()
    idling.park.shortage = lambda more: asked.append(more) or ("full" if more > 1 else None)  # type: ignore[func-returns-value]
    async with idling.serving(f"{NAME}@1") as client:
        await become(client, tuned="idle")
        assert await answer(client) == (200, f"{NAME}@1")
    assert set(asked) == {1}


async def test_no_model_is_stopped_to_free_memory_if_idling_is_disabled(idling: Home) -> None:
    idling.configure()
    idling.park.room = "full"
    async with idling.serving(f"{NAME}@1") as client:
        change_desired(idling.store, None, Target(VersionId(OTHER, 7), Format.MERGED), None)
        add_deployment(idling.store, OTHER)
        async with asyncio.timeout(5):
            while not (await client.get("/svc/status")).json()["refused"]:
                await asyncio.sleep(0.01)
        assert await states(client) == {NAME: "ready"}
