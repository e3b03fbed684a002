"""Tests several models on one server: they start, are added and are removed without affecting each other."""

import asyncio
import os
import signal
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine as Store

from serving.rollout.idling import Idling
from serving.rollout.production_alias import ProductionAlias
from serving.rollout.reconciler import Reconciler
from serving.rollout.reviver import Reviver
from serving.server import server
from svc.errors import EngineError
from svc.settings.client_apis import FineTuningSettings
from svc.settings.rollout import RolloutSettings
from svc.store.audit import Action, AuditEntry
from svc.store.deployments import add_deployment, deployed_names, remove_deployment
from svc.store.desired import change_desired, read_desired
from svc.store.rollouts import active_rollout, begin_rollout
from svc.store.swaps import find_swap
from svc.version import Format, Target, VersionId
from tests.builders.actors import ANN
from tests.serving.control import BODY, until
from tests.serving.engine_double import EngineDouble
from tests.serving.engine_park import DoubleEngine, fail_to_end_once
from tests.serving.home import Home
from tests.serving.other_server import serve_elsewhere
from tests.serving.versions import NAME, make_version

pytestmark = pytest.mark.slow

OTHER = "other"


@pytest.fixture
def two(home: Home) -> Home:
    """Return a home with three versions of one model and two of another."""
    for number in (7, 8):
        make_version(home.registry, number, name=OTHER)
    return home


async def answer_of(client: httpx.AsyncClient, model: str) -> tuple[int, str, str]:
    """Return the response status, the version in the header, and the number in the text or the error code."""
    answer = await client.post("/v1/chat/completions", json=BODY | {"model": model})
    body = answer.json()
    text = body["error"]["code"] if "error" in body else body["choices"][0]["message"]["content"].partition(".")[0]
    return answer.status_code, answer.headers.get("x-model-version", ""), text


async def states(client: httpx.AsyncClient) -> dict[str, str]:
    """Return the state of each model's engine, keyed by model."""
    models = (await client.get("/svc/status")).json()["models"]
    return {model["model"]: model["engine"]["state"] for model in models}


async def all_ready(client: httpx.AsyncClient, *names: str) -> None:
    """Wait until exactly these models are serving."""
    async with asyncio.timeout(5):
        while await states(client) != dict.fromkeys(names, "ready"):
            await asyncio.sleep(0.01)


def engine_of(home: Home, name: str) -> DoubleEngine:
    """Return a model's running engine."""
    (found,) = [engine for engine in home.park.engines if engine.alive and engine.double.name == name]
    return found


async def test_each_model_can_be_requested_by_all_of_its_names(two: Home) -> None:
    async with two.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        await all_ready(client, NAME, OTHER)
        assert await answer_of(client, NAME) == (200, f"{NAME}@1", "1")
        assert await answer_of(client, OTHER) == (200, f"{OTHER}@7", "7")
        assert await answer_of(client, f"{OTHER}@7") == (200, f"{OTHER}@7", "7")
        listed = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
    assert {NAME, f"{NAME}@1", OTHER, f"{OTHER}@7"} <= set(listed)


async def test_engines_of_two_models_start_one_after_another(two: Home) -> None:
    two.park.start_delay_s = 0.05
    async with two.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        await all_ready(client, NAME, OTHER)
    assert two.park.most_starting == 1


async def test_first_model_answers_while_the_second_starts(two: Home) -> None:
    async with two.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        two.park.start_delay_s = 0.0
        assert (await answer_of(client, NAME))[0] == 200


async def test_swap_of_one_model_does_not_affect_another(two: Home) -> None:
    async with two.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        await all_ready(client, NAME, OTHER)
        seen = read_desired(two.store, OTHER)
        assert seen is not None
        wish = change_desired(two.store, seen, Target(VersionId(OTHER, 8), Format.MERGED), seen.target)
        untouched = engine_of(two, NAME).double.weights
        await until(lambda: (swap := find_swap(two.store, OTHER, wish.generation)) and swap.result)
        assert await answer_of(client, OTHER) == (200, f"{OTHER}@8", "8")
        assert await answer_of(client, NAME) == (200, f"{NAME}@1", "1")
        assert engine_of(two, NAME).double.weights == untouched


async def test_engine_death_makes_only_its_own_model_unavailable(two: Home) -> None:
    async with two.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        await all_ready(client, NAME, OTHER)
        two.park.failing_starts = 1000
        engine_of(two, OTHER).kill()
        await until(lambda: len([engine for engine in two.park.engines if engine.alive]) == 1)
        async with asyncio.timeout(5):
            while (await states(client))[OTHER] == "ready":
                await asyncio.sleep(0.01)
        assert (await answer_of(client, OTHER))[::2] == (503, "engine_unavailable")
        assert await answer_of(client, NAME) == (200, f"{NAME}@1", "1")
        assert (await client.get("/health")).status_code == 200


async def test_remaining_models_are_served_even_if_one_model_cannot_be_served(two: Home) -> None:
    (two.registry.folder(VersionId(OTHER, 7)) / "merged" / "config.json").write_text("{}")
    async with two.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        assert await answer_of(client, NAME) == (200, f"{NAME}@1", "1")
        await until(lambda: two.failures)
    assert "was changed after registration" in str(two.failures[0])


async def test_reason_for_a_failed_model_start_is_reported_once_and_not_logged(
    two: Home, caplog: pytest.LogCaptureFixture
) -> None:
    two.park.failing_starts = 1
    async with two.serving(f"{NAME}@1", f"{OTHER}@7"):
        await until(lambda: two.failures)
        assert (len(two.failures), two.failures[0].wrong in caplog.text) == (1, False)


async def test_startup_failure_that_ends_the_server_is_raised_but_not_reported_or_logged(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    home.park.failing_starts = 1
    with server.claim(home.settings) as claim, pytest.raises(EngineError, match="no memory") as raised:
        await home.serve(claim, f"{NAME}@1")
    assert (home.failures, raised.value.wrong in caplog.text) == ([], False)


async def test_remaining_models_are_served_if_a_disk_error_prevents_the_start_of_one_model(two: Home) -> None:
    failures = [OSError("no space left on device")]

    def fail_once(double: EngineDouble) -> None:
        if double.name == OTHER and failures:
            raise failures.pop()

    two.park.prepare = fail_once
    async with two.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        assert await answer_of(client, NAME) == (200, f"{NAME}@1", "1")
        await until(lambda: two.failures)
        assert "no space left on device" in str(two.failures[0])
        await all_ready(client, NAME, OTHER)  # the start is tried again
        assert await answer_of(client, OTHER) == (200, f"{OTHER}@7", "7")


async def test_server_stops_with_the_reason_if_no_model_can_be_served(two: Home) -> None:
    two.park.failing_starts = 2
    with server.claim(two.settings) as claim, pytest.raises(EngineError, match="no memory"):
        await two.serve(claim, f"{NAME}@1", f"{OTHER}@7")
    assert two.park.alive == 0


async def test_no_engine_starts_if_memory_is_too_small_for_both_models(two: Home) -> None:
    two.park.shortage = lambda more: "no room" if more > 1 else None
    with server.claim(two.settings) as claim, pytest.raises(EngineError, match=r"memory for tuned@1.*other@7"):
        await two.serve(claim, f"{NAME}@1", f"{OTHER}@7")
    assert two.park.engines == []


async def test_server_started_without_names_serves_the_last_served_models(two: Home) -> None:
    async with two.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        await all_ready(client, NAME, OTHER)
    async with two.serving() as client:
        await all_ready(client, NAME, OTHER)
        assert await answer_of(client, OTHER) == (200, f"{OTHER}@7", "7")


async def test_training_only_server_is_healthy_and_can_serve_a_model_added_later(home: Home) -> None:
    tuning = FineTuningSettings(bases={"small": "/models/small"})
    home.settings = home.settings.model_copy(update={"fine_tuning": tuning})
    async with home.serving() as client:
        assert (await client.get("/health")).status_code == 200
        assert (await answer_of(client, NAME))[0] == 404
        change_desired(home.store, None, Target(VersionId(NAME, 2), Format.MERGED), None)
        add_deployment(home.store, NAME)
        await all_ready(client, NAME)
        assert await answer_of(client, NAME) == (200, f"{NAME}@2", "2")


async def test_running_engines_are_adopted_by_their_models_in_any_order(two: Home) -> None:
    def at_their_places() -> dict[int, str]:
        return {engine.replica: engine.double.name for engine in two.park.engines if engine.alive}

    with server.claim(two.settings) as claim:
        async with httpx.AsyncClient(base_url=claim.url, timeout=10) as client:
            task = asyncio.create_task(two.serve(claim, f"{NAME}@1", f"{OTHER}@7"))
            await all_ready(client, NAME, OTHER)
            before = at_their_places()
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.wait({task})
    assert len(two.park.left) == 2
    started = len(two.park.engines)
    async with two.serving(OTHER, NAME) as client:
        await all_ready(client, OTHER, NAME)
        assert at_their_places() == before
        assert await answer_of(client, NAME) == (200, f"{NAME}@1", "1")
        assert await answer_of(client, OTHER) == (200, f"{OTHER}@7", "7")
    assert len(two.park.engines) == started + 2, "adopted, and none started"


async def test_running_engine_of_a_model_no_longer_served_is_stopped(two: Home) -> None:
    with server.claim(two.settings) as claim:
        async with httpx.AsyncClient(base_url=claim.url, timeout=10) as client:
            task = asyncio.create_task(two.serve(claim, f"{NAME}@1", f"{OTHER}@7"))
            await all_ready(client, NAME, OTHER)
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.wait({task})
    async with two.serving(NAME) as client:
        await all_ready(client, NAME)
        await until(lambda: two.park.alive == 1)


async def test_model_is_added_while_the_server_runs(two: Home) -> None:
    async with two.serving(f"{NAME}@1") as client:
        assert (await answer_of(client, OTHER))[0] == 404
        change_desired(two.store, None, Target(VersionId(OTHER, 7), Format.MERGED), None)
        add_deployment(two.store, OTHER)
        await all_ready(client, NAME, OTHER)
        assert await answer_of(client, OTHER) == (200, f"{OTHER}@7", "7")


async def test_error_says_that_a_model_is_registered_but_not_served(two: Home) -> None:
    async with two.serving(f"{NAME}@1") as client:
        async with asyncio.timeout(5):
            while "registered, but not served" not in (message := await _message(client, OTHER)):
                await asyncio.sleep(0.01)
    assert f"svc add {OTHER}" in message


async def _message(client: httpx.AsyncClient, model: str) -> str:
    answer = await client.post("/v1/chat/completions", json=BODY | {"model": model})
    return str(answer.json()["error"]["message"])


async def test_model_is_not_added_without_enough_memory_and_status_shows_why(two: Home) -> None:
    async with two.serving(f"{NAME}@1") as client:
        two.park.room = "no room"
        change_desired(two.store, None, Target(VersionId(OTHER, 7), Format.MERGED), None)
        add_deployment(two.store, OTHER)
        refused = await refused_of(client)
        assert "not enough memory for other@7" in refused[OTHER]
        await until(lambda: deployed_names(two.store) == [NAME])
        assert await states(client) == {NAME: "ready"}
        assert two.park.alive == 1


async def test_model_that_does_not_start_is_not_added(two: Home) -> None:
    async with two.serving(f"{NAME}@1") as client:
        two.park.failing_starts = 1000
        change_desired(two.store, None, Target(VersionId(OTHER, 7), Format.MERGED), None)
        add_deployment(two.store, OTHER)
        refused = await refused_of(client)
        assert "before it was ready" in refused[OTHER]
        await all_ready(client, NAME)
        assert await answer_of(client, NAME) == (200, f"{NAME}@1", "1")


async def refused_of(client: httpx.AsyncClient) -> dict[str, str]:
    """Wait until a model is refused, and return the reasons."""
    async with asyncio.timeout(5):
        while not (refused := (await client.get("/svc/status")).json()["refused"]):
            await asyncio.sleep(0.01)
    return dict(refused)


@pytest.mark.parametrize("fault", ["no memory", "no start"])
async def test_failed_start_of_a_model_is_retried_if_another_server_serves_the_model(
    two: Home, postgresql_store: Store, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("serving.models.deployments._RETRY_S", 0.5)
    monkeypatch.setattr("serving.store_changes.changes.FALLBACK_POLL_S", 0.1)  # the second attempt is not notified
    two.store = postgresql_store
    change_desired(two.store, None, Target(VersionId(OTHER, 7), Format.MERGED), None)
    async with two.serving(f"{NAME}@1") as client:
        two.park.room = "no room" if fault == "no memory" else None
        two.park.failing_starts = 1000 if fault == "no start" else 0
        serve_elsewhere(two.store, Target(VersionId(OTHER, 7), Format.MERGED))
        add_deployment(two.store, OTHER)
        assert "another server serves the model" in (await refused_of(client))[OTHER]
        assert deployed_names(two.store) == [NAME, OTHER]
        two.park.room, two.park.failing_starts = None, 0
        await all_ready(client, NAME, OTHER)
        assert (await client.get("/svc/status")).json()["refused"] == {}


async def test_rollout_on_another_server_continues_when_the_local_server_cannot_start_the_model(
    two: Home, postgresql_store: Store
) -> None:
    two.store = postgresql_store
    seven, eight = (Target(VersionId(OTHER, number), Format.MERGED) for number in (7, 8))
    desired = change_desired(two.store, None, seven, None)
    async with two.serving(f"{NAME}@1") as client:
        two.park.failing_starts = 1000
        serve_elsewhere(two.store, seven)
        entry = AuditEntry(Action.PROMOTE, str(eight.version), ANN)
        begin_rollout(two.store, desired, eight, RolloutSettings(canary=(5, 100)), entry)
        add_deployment(two.store, OTHER)
        await refused_of(client)
        assert active_rollout(two.store, OTHER) is not None


async def test_refused_model_disappears_from_the_status_when_it_is_removed(two: Home, postgresql_store: Store) -> None:
    two.store = postgresql_store
    change_desired(two.store, None, Target(VersionId(OTHER, 7), Format.MERGED), None)
    async with two.serving(f"{NAME}@1") as client:
        two.park.room = "no room"
        serve_elsewhere(two.store, Target(VersionId(OTHER, 7), Format.MERGED))
        add_deployment(two.store, OTHER)
        await refused_of(client)
        remove_deployment(two.store, OTHER)
        async with asyncio.timeout(5):
            while (await client.get("/svc/status")).json()["refused"]:
                await asyncio.sleep(0.01)


async def test_model_is_removed_after_its_last_answer(two: Home) -> None:
    async with two.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        await all_ready(client, NAME, OTHER)
        engine_of(two, OTHER).double.token_delay_s = 0.1
        running = asyncio.create_task(answer_of(client, OTHER))
        await until(lambda: "/v1/chat/completions" in engine_of(two, OTHER).double.calls)
        remove_deployment(two.store, OTHER)
        assert await running == (200, f"{OTHER}@7", "7")
        await all_ready(client, NAME)
        assert (await answer_of(client, OTHER))[0] == 404
        assert two.park.alive == 1
        page = (await client.get("/metrics")).text
        assert f'svc_model_version_info{{format="merged",model="{OTHER}"' not in page
        assert await answer_of(client, NAME) == (200, f"{NAME}@1", "1")


async def test_removed_model_can_be_added_again(two: Home) -> None:
    async with two.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        await all_ready(client, NAME, OTHER)
        remove_deployment(two.store, OTHER)
        await all_ready(client, NAME)
        add_deployment(two.store, OTHER)
        await all_ready(client, NAME, OTHER)
        assert await answer_of(client, OTHER) == (200, f"{OTHER}@7", "7")


async def test_metrics_of_each_model_have_its_name_as_a_label(two: Home) -> None:
    async with two.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        await all_ready(client, NAME, OTHER)
        await answer_of(client, OTHER)
        page = (await client.get("/metrics")).text
    for name, number in ((NAME, 1), (OTHER, 7)):
        assert f'svc_engine_state{{model="{name}",state="ready"}} 1.0' in page
        assert f'svc_model_version_info{{format="merged",model="{name}",version="{number}"}} 1.0' in page
        assert f'svc_request_errors_total{{model="{name}",reason="queue_overflow",version=""}} 0.0' in page
    assert 'svc_requests_total{model="other",outcome="complete"' in page
    assert 'svc_requests_total{model="tuned",outcome="complete"' not in page


@pytest.mark.parametrize(
    ("part", "method"), [(Reconciler, "follow"), (Reviver, "run"), (Idling, "run"), (ProductionAlias, "run")]
)
async def test_crashed_component_of_a_model_is_restarted(
    two: Home, monkeypatch: pytest.MonkeyPatch, part: type, method: str
) -> None:
    """Neither the server nor another model stops, and the status shows the error."""
    monkeypatch.setattr("serving.models.deployment._RESTART_PAUSE_S", 0.05)
    run, failures = getattr(part, method), [ZeroDivisionError("one"), ZeroDivisionError("two")]

    async def fail_twice(self: Any) -> None:
        if failures:
            raise failures.pop()
        await run(self)

    monkeypatch.setattr(part, method, fail_twice)
    async with two.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        await all_ready(client, NAME, OTHER)
        await until(lambda: not failures)
        models = (await client.get("/svc/status")).json()["models"]
        assert any("ZeroDivisionError" in str(model["engine"]["last_error"]) for model in models)
        for name, number in ((NAME, 2), (OTHER, 8)):
            seen = read_desired(two.store, name)
            assert seen is not None
            change_desired(two.store, seen, Target(VersionId(name, number), Format.MERGED), seen.target)
            async with asyncio.timeout(5):
                while (await answer_of(client, name))[1] != f"{name}@{number}":
                    await asyncio.sleep(0.02)


async def test_server_continues_if_a_removed_model_cannot_be_stopped_at_first(
    two: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two.serving(f"{NAME}@1", f"{OTHER}@7") as client:
        await all_ready(client, NAME, OTHER)
        failures = fail_to_end_once(monkeypatch)
        remove_deployment(two.store, OTHER)
        await all_ready(client, NAME)
        assert not failures
        assert await answer_of(client, NAME) == (200, f"{NAME}@1", "1")
