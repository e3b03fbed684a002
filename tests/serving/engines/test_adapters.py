"""Tests versions served as adapters of one base: by name, verified, promoted under load, and reloaded."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.responses import JSONResponse
from starlette.types import Message, Send

from serving.admission.errors import QueueTimeoutError
from serving.engines.verification import find_retaken_probes
from serving.gateway.delivery import PART_BYTES
from svc.engine.probes import EngineFacts
from svc.settings.engine import AdapterSettings
from svc.settings.serve import SwapChoice
from svc.store.desired import change_desired
from svc.store.swaps import SwapKind, SwapOutcome
from svc.version import Format, VersionId
from tests.builders.adapters import BOTH, adapter, ask, numbers, versions
from tests.serving.control import BODY, Control, Load, Make, until
from tests.serving.engine_double import EngineDouble, Fault
from tests.serving.home import Home
from tests.serving.versions import FACTS, NAME, base_folder, make_version
from tests.serving.vllm_wire import CompletionsWire, Wire

pytestmark = pytest.mark.slow


@pytest.fixture
async def served(make: Make) -> AsyncIterator[Control]:
    """Yield a server with version 1 in production as an adapter. At most two adapters are loaded."""
    async with make(format=Format.ADAPTER, adapters=AdapterSettings(max_loaded=2)).run() as control:
        yield control


async def test_engine_loads_the_base_model_and_serves_the_production_adapter_under_the_model_name(
    served: Control,
) -> None:
    assert served.double.weights == str(base_folder(served.registry))
    async with served.client() as client:
        assert await ask(client, NAME) == (200, f"{NAME}@1", "1")
        assert await ask(client, f"{NAME}@production") == (200, f"{NAME}@1", "1")
    assert numbers(served.double) == [1]


async def test_requested_version_is_loaded_on_demand_and_answers_the_request(served: Control) -> None:
    async with served.client() as client:
        assert await ask(client, f"{NAME}@3") == (200, f"{NAME}@3", "3")
        assert await ask(client, f"{NAME}@2") == (200, f"{NAME}@2", "2")
        assert await ask(client, f"{NAME}@2") == (200, f"{NAME}@2", "2")
    assert (numbers(served.double), len(served.double.adapter_loads)) == ([2, 3], 3)
    assert served.sample("svc_adapter_loads_total", model=NAME) == 3
    assert served.sample("svc_adapters_loaded", model=NAME) == 2


async def test_loaded_versions_are_listed_and_any_version_can_be_retrieved(served: Control) -> None:
    async with served.client() as client:
        await ask(client, f"{NAME}@2")
        listed = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        shown = await client.get(f"/v1/models/{NAME}@3")
        unknown = await client.get(f"/v1/models/{NAME}@77")
    assert listed == [NAME, f"{NAME}@1", f"{NAME}@2", f"{NAME}@production"]
    assert (shown.status_code, shown.json()["id"]) == (200, f"{NAME}@3")
    assert unknown.status_code == 404


async def test_request_with_an_invalid_version_name_is_not_forwarded_to_the_engine(served: Control) -> None:
    for model in (f"{NAME}@9", f"{NAME}@x", f"{NAME}@", f"{NAME}@1/../2", f"{NAME}@0", f"{NAME}@2#a"):
        before = len(served.double.calls)
        async with served.client() as client:
            assert (await ask(client, model))[::2] == (404, "model_not_found"), model
        assert set(served.double.calls[before:]) <= {"/health"}, model  # sent by the server itself
        assert numbers(served.double) == [1], model


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": BODY["messages"]},
    "/v1/completions": {"prompt": "one two three"},
    "/v1/responses": {"input": "one two three"},
    "/v1/messages": {"messages": BODY["messages"], "max_tokens": 4},
}


async def test_answers_from_an_adapter_contain_the_name_of_its_version(served: Control) -> None:
    async with served.client() as client:
        for path, body in BODIES.items():
            for stream in (False, True):
                answer = await client.post(path, json=body | {"model": f"{NAME}@2", "stream": stream})
                assert answer.status_code == 200, path
                assert f'"model":"{NAME}@2"' in answer.text.replace(": ", ":"), path
                assert f"{NAME}@2#" not in answer.text, path


async def test_engine_error_shows_the_version_name_instead_of_the_internal_adapter_name(served: Control) -> None:
    async with served.client() as client:
        await ask(client, f"{NAME}@2")
        (private,) = (name for name in served.double.adapters if name.startswith(f"{NAME}@2#"))
        error = {"message": f"{private} takes no images", "type": "BadRequestError", "code": 400, "param": private}
        served.double.refuse_with = 400, error
        for path in (*BODIES, "/tokenize", "/v1/messages/count_tokens"):
            body = BODIES.get(path, BODIES["/v1/messages"])
            answer = await client.post(path, json=body | {"model": f"{NAME}@2"})
            assert answer.status_code == 400, path
            assert answer.json()["error"]["message"] == f"{NAME}@2 takes no images", path
            assert private not in answer.text, path


async def test_token_count_response_for_an_adapter_contains_the_name_of_its_version(
    served: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def counted(double: EngineDouble, send: Send, path: str, body: dict[str, Any]) -> None:
        await JSONResponse({"count": 3, "model": body["model"]})({"type": "http"}, _never, send)

    monkeypatch.setattr(EngineDouble, "_tokenize", counted)
    async with served.client() as client:
        answer = await client.post("/tokenize", json=BODY | {"model": f"{NAME}@2"})
    assert answer.json() == {"count": 3, "model": f"{NAME}@2"}


async def _never() -> Message:
    raise AssertionError("a JSON answer reads nothing")


async def test_mid_stream_error_from_an_adapter_names_its_version(
    served: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(wire: Wire, message: str) -> list[bytes]:
        error = {"message": f"{wire.model} takes no images", "type": "BadRequestError", "code": 400}
        return [b"data: " + json.dumps({"error": error}).encode() + b"\n\n"]

    monkeypatch.setattr(CompletionsWire, "failure", refused)
    served.double.fault = Fault.ERROR_IN_STREAM
    async with served.client() as client:
        answer = await client.post("/v1/chat/completions", json=BODY | {"model": f"{NAME}@2", "stream": True})
    assert f'"{NAME}@2 takes no images"' in answer.text
    assert f"{NAME}@2#" not in answer.text


async def test_content_length_of_a_long_answer_from_an_adapter_is_correct(served: Control) -> None:
    served.double.tokens = 20_000
    async with served.client() as client:
        answer = await client.post("/v1/chat/completions", json=BODY | {"model": f"{NAME}@2", "max_tokens": 20_000})
    assert int(answer.headers["content-length"]) == len(answer.content) > PART_BYTES
    assert answer.json()["model"] == f"{NAME}@2"


async def test_forty_adapter_versions_are_served_with_four_slots(make: Make) -> None:
    control = make(format=Format.ADAPTER, adapters=AdapterSettings(max_loaded=4))
    versions(control, *range(4, 41))
    async with control.run(), control.client() as client:
        for number in range(1, 41):
            assert await ask(client, f"{NAME}@{number}") == (200, f"{NAME}@{number}", str(number))
        assert (control.double.most_adapters, len(control.double.adapter_loads)) == (4, 40)


async def test_adapter_is_loaded_once_for_many_concurrent_first_requests(served: Control) -> None:
    served.double.adapter_delay_s = 0.05
    async with served.client() as client:
        answers = await asyncio.gather(*(ask(client, f"{NAME}@2") for _ in range(30)))
    assert set(answers) == {(200, f"{NAME}@2", "2")}
    assert len(served.double.adapter_loads) == 2


async def test_adapter_is_not_unloaded_while_it_serves_a_request(served: Control) -> None:
    versions(served, 4, 5, 6)
    served.double.token_delay_s = 0.005
    async with served.client() as client:
        asked = [f"{NAME}@{number}" for number in (1, 2, 3, 4, 5, 6)] * 6
        answers = await asyncio.gather(*(ask(client, model, stream=False) for model in asked))
    assert answers == [(200, model, model.partition("@")[2]) for model in asked]
    assert (served.double.dropped_in_use, served.double.most_adapters) == ([], 2)


async def test_response_has_a_retry_after_header_if_no_adapter_slot_becomes_free_in_time(make: Make) -> None:
    control = make(format=Format.ADAPTER, adapters=AdapterSettings(max_loaded=1), queue_timeout_s=0.05)
    async with control.run(), control.client() as client:
        control.double.token_delay_s = 0.1
        first = asyncio.create_task(ask(client, NAME))
        await until(lambda: control.double.running)
        answer = await client.post("/v1/chat/completions", json=BODY | {"model": f"{NAME}@2"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_timeout")
        assert answer.headers["retry-after"] == str(QueueTimeoutError.retry_after_s)
        assert await first == (200, f"{NAME}@1", "1")


async def test_adapter_that_fails_verification_is_unloaded_before_it_answers_a_request(served: Control) -> None:
    versions(served, 4, probes_of="/elsewhere")
    async with served.client() as client:
        assert (await ask(client, f"{NAME}@4"))[::2] == (503, "engine_adapter_failed")
        assert await ask(client, NAME) == (200, f"{NAME}@1", "1")
    assert numbers(served.double) == [1]


async def test_version_is_rejected_if_the_engine_does_not_apply_its_adapter(served: Control) -> None:
    """The engine then answers like the base, whose log-probabilities can be within half a nat of the version's."""
    versions(served, 4, probes_of=served.double.weights, noise=0.1)
    served.double.weights_of = lambda model: served.double.weights  # type: ignore[method-assign]
    async with served.client() as client:
        assert (await ask(client, f"{NAME}@4"))[::2] == (503, "engine_adapter_failed")


async def test_load_of_a_rejected_adapter_is_retried_on_the_next_request(served: Control) -> None:
    served.double.broken_adapters = {"2/adapter"}
    async with served.client() as client:
        assert (await ask(client, f"{NAME}@2"))[::2] == (503, "engine_adapter_failed")
        served.double.broken_adapters = set()
        assert await ask(client, f"{NAME}@2") == (200, f"{NAME}@2", "2")


async def test_altered_adapter_files_are_not_loaded(served: Control) -> None:
    file = served.registry.folder(VersionId(NAME, 2)) / "adapter" / "adapter_model.safetensors"
    file.write_bytes(b"other")
    async with served.client() as client:
        assert (await ask(client, f"{NAME}@2"))[::2] == (503, "engine_adapter_failed")
    assert len(served.double.adapter_loads) == 1


async def test_adapter_probes_are_stored_for_the_next_load(served: Control) -> None:
    async with served.client() as client:
        await ask(client, f"{NAME}@2")
        assert find_retaken_probes(served.store, adapter(2), FACTS)
        for number in (3, 1):  # replaces the adapter
            await ask(client, f"{NAME}@{number}")
        served.double.probe_noise = 0.01  # less than between two kinds of engine, but more than within one
        assert (await ask(client, f"{NAME}@2"))[::2] == (503, "engine_adapter_failed")


async def test_adapter_without_verification_probes_is_served_as_unverified(served: Control) -> None:
    make_version(served.registry, 4, formats=(Format.ADAPTER,))
    async with served.client() as client:
        assert (await ask(client, f"{NAME}@4"))[:2] == (200, f"{NAME}@4")
    verified = {str(each.version): each.checked.verified for each in served.pool.members[0].adapters.loaded}  # type: ignore[union-attr]
    assert verified == {f"{NAME}@1": True, f"{NAME}@4": False}
    assert served.sample("svc_versions_unverified", model=NAME) == 1


async def test_promotion_of_an_adapter_without_verification_probes_is_recorded_as_unverified(served: Control) -> None:
    make_version(served.registry, 4, formats=(Format.ADAPTER,))
    assert (await served.promote(4)).outcome is SwapOutcome.SUCCEEDED
    assert served.steps[-1] == "adapter loaded: not verified: the version has no probes in any format"
    checked = served.pool.members[0].checked
    assert checked and not checked.verified
    await served.promote(2)
    assert served.pool.members[0].checked and served.pool.members[0].checked.verified


async def test_adapter_that_the_base_cannot_apply_is_rejected_with_the_reason(served: Control) -> None:
    other = served.settings.home / "other"
    shutil.copytree(base_folder(served.registry), other)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"use_dora": True}, "it is DoRA"),
        ({"base_model_name_or_path": str(other)}, "different base models or chat templates"),
        ({"r": 64}, "has rank 64"),
        ({"target_modules": ["c_attn"]}, "layers c_attn"),
    ]
    async with served.client() as client:
        for number, (config, reason) in enumerate(cases, 4):
            versions(served, number, adapter=config)
            answer = await client.post("/v1/chat/completions", json=BODY | {"model": f"{NAME}@{number}"})
            assert answer.status_code == 404, reason
            assert reason in answer.json()["error"]["message"] and str(served.settings.home) not in answer.text


async def test_adapter_that_failed_a_check_is_served_only_after_it_is_promoted(served: Control) -> None:
    versions(served, 4, failed=("parity",))
    async with served.client() as client:
        assert (await ask(client, f"{NAME}@4"))[::2] == (404, "model_not_found")
        assert (await served.promote(4)).kind is SwapKind.ADAPTER  # forced
        for number in (2, 3):  # replaces version 4
            await ask(client, f"{NAME}@{number}")
        assert await ask(client, NAME) == (200, f"{NAME}@4", "4")


async def test_version_with_only_merged_weights_is_not_found_as_an_adapter(served: Control) -> None:
    make_version(served.registry, 4)
    async with served.client() as client:
        assert (await ask(client, f"{NAME}@4"))[::2] == (404, "model_not_found")


async def test_no_request_waits_when_an_adapter_is_promoted(served: Control) -> None:
    served.double.token_delay_s = 0.005
    async with served.client() as client, Load(client).run(streams=4, plain=2) as load:
        await until(lambda: len(load.answers) > 6)
        result = await served.promote(2)
        await until(lambda: load.versions[f"{NAME}@2"] > 6)
    load.check()
    assert (result.outcome, result.kind, result.queued_s) == (SwapOutcome.SUCCEEDED, SwapKind.ADAPTER, None)
    assert (len(served.park.engines), served.park.engines[0].holds) == (1, str(adapter(2)))
    assert served.book.book["production"] == VersionId(NAME, 2)  # type: ignore[index]


async def test_served_version_stays_in_production_if_the_promoted_adapter_fails_verification(served: Control) -> None:
    versions(served, 4, probes_of="/elsewhere")
    result = await served.promote(4)
    assert (result.outcome, served.desired().target) == (SwapOutcome.REFUSED, adapter(1))
    async with served.client() as client:
        assert await ask(client, NAME) == (200, f"{NAME}@1", "1")


async def test_adapter_promotion_is_cancelled_if_another_version_becomes_desired(served: Control) -> None:
    served.double.adapter_delay_s = 0.3
    loads = served.double.calls.count("/v1/load_lora_adapter")
    wish = served.wish(2)
    await until(lambda: served.double.calls.count("/v1/load_lora_adapter") > loads)
    served.wish(1)
    assert (await served.outcome(wish)).outcome is SwapOutcome.CANCELLED
    async with served.client() as client:
        assert await ask(client, NAME) == (200, f"{NAME}@1", "1")


async def test_promotion_to_a_different_base_model_uses_a_blue_green_swap(served: Control) -> None:
    other = served.settings.home / "other"
    shutil.copytree(base_folder(served.registry), other)
    versions(served, 4, adapter={"base_model_name_or_path": str(other)})
    result = await served.promote(4)
    assert (result.outcome, result.kind) == (SwapOutcome.SUCCEEDED, SwapKind.BLUEGREEN)
    assert served.double.weights == str(other)
    async with served.client() as client:
        assert await ask(client, NAME) == (200, f"{NAME}@4", "4")


async def test_promotion_to_a_larger_lora_rank_uses_a_blue_green_swap(served: Control) -> None:
    versions(served, 4, adapter={"r": 64})
    result = await served.promote(4)
    assert (result.outcome, result.kind) == (SwapOutcome.SUCCEEDED, SwapKind.BLUEGREEN)


async def test_promotion_of_an_adapter_above_the_maximum_lora_rank_is_refused_with_a_suggested_fix(make: Make) -> None:
    control = make(format=Format.ADAPTER, adapters=AdapterSettings(max_rank=32))
    versions(control, 4, adapter={"r": 64})
    async with control.run():
        result = await control.promote(4)
    assert result.outcome is SwapOutcome.REFUSED and result.reason and "increase `adapters.max_rank`" in result.reason


async def test_promotion_always_uses_a_blue_green_swap_if_configured(make: Make) -> None:
    async with make(format=Format.ADAPTER, swap=SwapChoice.BLUEGREEN).run() as control:
        assert (await control.promote(2)).kind is SwapKind.BLUEGREEN


async def test_each_of_several_engines_loads_the_promoted_adapter(make: Make) -> None:
    async with make(format=Format.ADAPTER, replicas=2).run() as control:
        await until(lambda: len(control.pool.ready) == 2)
        result = await control.promote(2)
        assert (result.outcome, result.kind) == (SwapOutcome.SUCCEEDED, SwapKind.ADAPTER)
        assert [member.target for member in control.pool.members] == [adapter(2)] * 2


async def test_first_engine_is_restored_if_the_second_rejects_the_adapter(make: Make) -> None:
    async with make(format=Format.ADAPTER, replicas=2).run() as control:
        await until(lambda: len(control.pool.ready) == 2)
        control.park.engines[1].double.broken_adapters = {"2/adapter"}
        result = await control.promote(2)
        assert result.outcome is SwapOutcome.RESTORED
        assert [member.target for member in control.pool.members] == [adapter(1)] * 2


async def test_adapters_are_reloaded_on_demand_after_the_engine_dies(served: Control) -> None:
    async with served.client() as client:
        await ask(client, f"{NAME}@2")
        served.double.die()
        await until(lambda: len(served.park.engines) == 2 and served.pool.ready)
        assert numbers(served.double) == [1]
        assert await ask(client, f"{NAME}@2") == (200, f"{NAME}@2", "2")
    assert set(served.park.engines[0].double.adapters).isdisjoint(served.double.adapters)


async def test_adapter_names_used_before_engine_adoption_are_not_reused_afterwards(make: Make) -> None:
    control = make(format=Format.ADAPTER)
    control.leaves = True
    async with control.run(), control.client() as client:
        await ask(client, f"{NAME}@2")
        before = set(control.double.adapters)
    control.leaves = False
    control.assemble()
    async with control.run(), control.client() as client:
        assert len(control.park.engines) == 2  # the second object adopted the first engine
        assert await ask(client, NAME) == (200, f"{NAME}@1", "1")
        assert numbers(control.double) == [1] and before.isdisjoint(control.double.adapters)


async def test_swap_between_formats_uses_a_second_engine(make: Make) -> None:
    control = make(format=Format.ADAPTER)
    async with control.run(), control.client() as client:
        control.format = Format.MERGED
        result = await control.promote(2)
        assert (result.outcome, result.kind) == (SwapOutcome.SUCCEEDED, SwapKind.BLUEGREEN)
        assert await ask(client, NAME) == (200, f"{NAME}@2", "2")
        assert (await ask(client, f"{NAME}@3"))[::2] == (404, "model_not_found")
        control.format = Format.ADAPTER
        assert (await control.promote(3)).kind is SwapKind.BLUEGREEN
        assert await ask(client, f"{NAME}@1") == (200, f"{NAME}@1", "1")


async def test_missing_base_model_is_reported(make: Make) -> None:
    control = make(format=Format.ADAPTER)
    shutil.rmtree(base_folder(control.registry))
    with pytest.raises(Exception, match="the base model of tuned@1 is no longer in"):
        await control.start()


async def test_verification_probes_of_an_adapter_are_recorded_again_for_a_new_engine_kind(make: Make) -> None:
    other: EngineFacts = FACTS.model_copy(update={"vllm": "0.33.0"})
    control = make(format=Format.ADAPTER, facts=other)
    control.park.prepare = lambda double: setattr(double, "probe_noise", 0.01)
    async with control.run():
        assert find_retaken_probes(control.store, adapter(1), other)


async def test_server_process_serves_adapters_of_its_base_model(home: Home) -> None:
    for number in (4, 5):
        make_version(home.registry, number, formats=BOTH)
    change_desired(home.store, None, adapter(4), None)
    async with home.serving(NAME) as client:
        assert await ask(client, NAME) == (200, f"{NAME}@4", "4")
        assert await ask(client, f"{NAME}@5") == (200, f"{NAME}@5", "5")
        (status,) = (await client.get("/svc/status")).json()["models"]
        page = (await client.get("/metrics")).text
    model = home.park.engines[0].model
    assert (model.folder, model.lora and model.lora.max_rank) == (base_folder(home.registry), 16)
    assert (status["version"], status["format"]) == (f"{NAME}@4", "adapter")
    loaded = [{"version": f"{NAME}@{number}", "verified": True} for number in (4, 5)]
    assert status["engines"][0]["adapters"] == loaded
    assert 'svc_adapters_loaded{model="tuned"} 2.0' in page


async def test_held_out_evaluation_is_skipped_for_adapters_and_the_reason_is_shown(home: Home) -> None:
    make_version(home.registry, 4, formats=BOTH, answered=3)
    change_desired(home.store, None, adapter(4), None)
    async with home.serving(NAME) as client:
        async with asyncio.timeout(5):
            while True:
                holdout = (await client.get("/svc/status")).json()["models"][0]["holdout"]
                if holdout["state"] == "off":
                    break
                await asyncio.sleep(0.01)
    assert "none for its adapter" in holdout["reason"]
