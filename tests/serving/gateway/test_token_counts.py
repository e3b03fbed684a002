"""Tests that token counts take no slot in admission and cost a key nothing."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest

from serving.admission.rate_limiter import Limit
from serving.gateway.token_counts import MAX_CONCURRENT
from svc.identity.principal import Principal
from tests.serving.admission.opened import admitted
from tests.serving.keyed import principal
from tests.serving.service import CHAT, CHAT_PATH, NAME, Service, closed, error_of

COUNT, TOKENIZE = "/v1/messages/count_tokens", "/tokenize"
BODY: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "one two three"}]}
both = pytest.mark.parametrize("path", [COUNT, TOKENIZE])


@pytest.fixture
async def service(socket_folder: Path) -> AsyncIterator[Service]:
    async with Service(socket_folder, max_running=1).run() as service:
        yield service


@pytest.mark.slow
async def test_anthropic_client_counts_tokens(service: Service) -> None:
    from anthropic import AsyncAnthropic

    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(service.app))
    async with AsyncAnthropic(api_key="none", base_url="http://localhost", http_client=http) as official:
        counted = await official.messages.count_tokens(**BODY)
    assert counted.input_tokens == 3


@pytest.mark.parametrize("body", [BODY, {"model": f"{NAME}@1", "prompt": "one two three"}], ids=["chat", "plain"])
async def test_token_count_and_version_come_from_the_engine(client: httpx.AsyncClient, body: Any) -> None:
    answer = await client.post(TOKENIZE, json=body)
    assert (answer.json()["count"], len(answer.json()["tokens"])) == (3, 3)
    assert answer.headers["x-model-version"] == f"{NAME}@1"


@both
async def test_token_counting_occupies_no_admission_slot(
    service: Service, client: httpx.AsyncClient, path: str
) -> None:
    service.double.tokenize_delay_s = 0.05
    counting = [asyncio.create_task(client.post(path, json=BODY)) for _ in range(4)]
    await asyncio.sleep(0.02)
    assert service.admission.running == 0
    assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200
    async with admitted(service.admission):
        assert (await client.post(path, json=BODY)).status_code == 200
    assert {answer.status_code for answer in await asyncio.gather(*counting)} == {200}


@both
async def test_token_count_request_waits_for_the_engine_during_a_swap(
    service: Service, client: httpx.AsyncClient, path: str
) -> None:
    async with closed(service.admission):
        counting = asyncio.create_task(client.post(path, json=BODY))
        await service.admission.queue.wanted()
        assert service.double.calls == []
    assert (await counting).status_code == 200
    assert service.admission.running == 0


@both
async def test_token_count_request_gets_503_when_a_swap_takes_too_long(socket_folder: Path, path: str) -> None:
    async with (
        Service(socket_folder, queue_timeout_s=0.02).run() as service,
        service.socket_client() as client,
        closed(service.admission),
    ):
        answer = await client.post(path, json=BODY)
    assert (answer.status_code, error_of(answer)["code"]) == (503, "queue_timeout")


@both
async def test_model_is_not_idle_while_tokens_are_counted(
    service: Service, client: httpx.AsyncClient, path: str
) -> None:
    await asyncio.sleep(0.05)
    before = service.admission.idle_s
    await client.post(path, json=BODY)
    assert service.admission.idle_s < before


@both
async def test_token_counting_does_not_count_towards_a_keys_rate_limits(
    service: Service, client: httpx.AsyncClient, path: str
) -> None:
    key = principal("k", requests_per_minute=1, tokens_in_per_minute=10, tokens_per_day=10, concurrent=1)
    service.principals["k"] = key
    answers = [await client.post(path, json=BODY, headers={"x-api-key": "k"}) for _ in range(3)]
    assert {answer.status_code for answer in answers} == {200}
    assert service.limiter.allowances(key)[Limit.REQUESTS_PER_MINUTE].remaining == 1
    assert service.limiter.allowances(key)[Limit.TOKENS_PER_DAY].remaining == 10
    assert service.count("svc_key_requests_total", model=NAME, key_id="k") == 0
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "0"  # while the request runs


@pytest.mark.slow
@both
async def test_concurrent_token_count_requests_are_limited_and_one_key_gets_at_most_half_the_slots(
    service: Service, client: httpx.AsyncClient, path: str
) -> None:
    service.principals |= {name: principal(name) for name in ("one", "other")}
    service.double.tokenize_delay_s = 0.2

    async def ask(key: str) -> int:
        return (await client.post(path, json=BODY, headers={"x-api-key": key})).status_code

    statuses = await asyncio.gather(*(ask("one") for _ in range(MAX_CONCURRENT)), ask("other"))
    assert statuses.count(429) == MAX_CONCURRENT // 2
    assert statuses[-1] == 200
    assert await ask("one") == 200


@both
async def test_key_cannot_count_tokens_for_models_that_it_is_not_allowed_to_use(
    service: Service, client: httpx.AsyncClient, path: str
) -> None:
    key = principal("k")
    service.principals["k"] = Principal(key.key_id, key.name, key.scopes, frozenset({"other"}))
    answer = await client.post(path, json=BODY, headers={"x-api-key": "k"})
    assert answer.status_code >= 400
    assert service.double.calls == []


@both
async def test_token_counting_rejects_the_same_fields_as_completions(
    service: Service, client: httpx.AsyncClient, path: str
) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}
    body = {**BODY, "messages": [{"role": "user", "content": [image]}]}
    answer = await client.post(path, json=body)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_request")
    assert service.double.calls == []


@both
async def test_invalid_token_count_request_returns_a_specific_error_code(client: httpx.AsyncClient, path: str) -> None:
    cases: list[tuple[Any, int, str]] = [
        ({**BODY, "model": "other"}, 404, "model_not_found"),
        ({"model": NAME}, 400, "invalid_request"),
        ([], 400, "invalid_json"),
    ]
    for body, status, code in cases:
        answer = await client.post(path, json=body)
        assert (answer.status_code, error_of(answer)["code"]) == (status, code), body
        assert ("type" in answer.json()) == (path == COUNT), body


@both
async def test_oversized_token_count_body_is_rejected_after_being_read(socket_folder: Path, path: str) -> None:
    async with Service(socket_folder, max_body_bytes=2048).run() as service, service.socket_client() as client:
        answer = await client.post(path, json={**BODY, "messages": [{"role": "user", "content": "a" * 100_000}]})
        assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")


@both
async def test_token_count_response_has_retry_after_if_there_is_no_engine(
    service: Service, client: httpx.AsyncClient, path: str
) -> None:
    assert service.engine is not None
    service.engine.kill()
    answer = await client.post(path, json=BODY)
    assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_died")
    assert answer.headers["retry-after"]
