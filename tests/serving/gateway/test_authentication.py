"""Tests which requests are authorized for which paths, and for how long."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine as Store
from starlette import routing
from starlette.types import Message

from serving.access.authenticator import InvalidKeyError, KeyFault
from serving.access.keyring import Keyring
from serving.gateway.authentication import Authentication
from serving.gateway.failed_keys import MAX_INVALID_PER_MINUTE
from serving.http.request_state import STATE_KEY, RequestState
from serving.protocols.route import Route
from serving.store_changes.changes import Changes
from svc.identity.key_secret import new_secret
from svc.identity.principal import Scope
from tests.builders.actors import ALICE
from tests.serving.control import until
from tests.serving.http.keyed_service import BODIES, KeyedService
from tests.serving.service import CHAT, NAME, closed

CHAT_PATH = Route.CHAT_COMPLETIONS.value


@pytest.fixture
async def service(socket_folder: Path, store: Store) -> AsyncIterator[KeyedService]:
    service = KeyedService(socket_folder, store=store)
    async with service.run():
        yield service


@pytest.fixture
async def client(service: KeyedService) -> AsyncIterator[httpx.AsyncClient]:
    async with service.client() as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_no_key_is_required_if_none_exists(client: httpx.AsyncClient) -> None:
    assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200


async def test_key_is_required_once_the_first_key_exists(service: KeyedService, client: httpx.AsyncClient) -> None:
    service.key()
    answer = await client.post(CHAT_PATH, json=CHAT)
    assert code_of(answer) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"].startswith("req-")
    assert service.double.requests == []


async def test_revoked_key_is_rejected_if_other_keys_exist(service: KeyedService, client: httpx.AsyncClient) -> None:
    service.revoke(service.key())
    service.authenticator.refresh()
    assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 401


@pytest.mark.parametrize(
    ("route", "headers"),
    [
        (Route.CHAT_COMPLETIONS, lambda secret: {"authorization": f"Bearer {secret}"}),
        (Route.COMPLETIONS, lambda secret: {"authorization": f"bearer  {secret} "}),
        (Route.MESSAGES, lambda secret: {"x-api-key": secret}),
        (Route.RESPONSES, lambda secret: {"x-api-key": secret, "authorization": "Basic eDp5"}),
    ],
    ids=["OpenAI", "lower case", "Anthropic", "with another key for a proxy"],
)
async def test_key_is_accepted_in_the_headers_of_all_supported_clients(
    service: KeyedService, client: httpx.AsyncClient, route: Route, headers: Callable[[str], dict[str, str]]
) -> None:
    answer = await client.post(route.value, json=BODIES[route], headers=headers(service.key().secret))
    assert answer.status_code == 200, answer.text


async def test_invalid_key_is_rejected_on_every_route(service: KeyedService, client: httpx.AsyncClient) -> None:
    wrong = new_secret(service.key().key.id)
    for route in Route:
        answer = await client.post(route.value, json=BODIES[route], headers=bearer(wrong))
        assert code_of(answer) == (401, "invalid_api_key"), route
        assert wrong not in answer.text


@pytest.mark.slow
async def test_key_can_access_only_the_paths_its_scopes_allow(service: KeyedService, client: httpx.AsyncClient) -> None:
    paths = [
        ("POST", CHAT_PATH, Scope.INFER),
        ("POST", "/tokenize", Scope.INFER),
        ("POST", "/v1/messages/count_tokens", Scope.INFER),
        ("GET", "/v1/models", Scope.INFER),
        ("GET", f"/v1/models/{NAME}", Scope.INFER),
        ("POST", "/v1/feedback", Scope.FEEDBACK),
        ("GET", "/metrics", Scope.METRICS),
        ("GET", "/svc/status", Scope.METRICS),
        ("POST", "/svc/promote", Scope.ADMIN),
        ("GET", "/svc/keys", Scope.ADMIN),
        ("GET", "/svc/what-is-not-there", Scope.ADMIN),
        ("GET", "/v1/files", Scope.FILES),
        ("GET", "/v1/files/file-1/content", Scope.FILES),
        ("POST", "/v1/uploads", Scope.FILES),
        ("POST", "/v1/uploads/upload_1/cancel", Scope.FILES),
        ("GET", "/v1/batches", Scope.FILES),
        ("POST", "/v1/batches/batch_1/cancel", Scope.FILES),
        ("POST", "/v1/fine_tuning/jobs", Scope.JOBS),
        ("GET", "/v1/fine_tuning/jobs/ftjob-1/events", Scope.JOBS),
    ]
    wrong = []
    for scope in Scope:
        headers = bearer(service.key(scope).secret)
        for method, path, needed in paths:
            answer = await client.request(method, path, headers=headers)
            status, refused = answer.status_code, '"permission_denied"' in answer.text
            if refused == (scope in (needed, Scope.ADMIN)) or status == 401:
                wrong.append(f"{method} {path} with {scope}: {status}")
    assert wrong == []


async def test_missing_scope_is_reported_as_permission_denied(service: KeyedService) -> None:
    async with service.client_of(service.key(Scope.METRICS)) as client:
        assert code_of(await client.post(CHAT_PATH, json=CHAT)) == (403, "permission_denied")
    assert service.double.requests == []


@pytest.mark.parametrize("path", [CHAT_PATH, "/tokenize"])
async def test_key_may_only_use_its_allowed_models(service: KeyedService, client: httpx.AsyncClient, path: str) -> None:
    other = service.key(models=frozenset({"mine"}))
    answer = await client.post(path, json=CHAT, headers=bearer(other.secret))
    assert code_of(answer) == (404, "model_not_found")
    assert service.double.requests == []


async def test_health_endpoint_requires_no_key_and_shows_no_version(
    service: KeyedService, client: httpx.AsyncClient
) -> None:
    service.key()
    for path in ("/health", "/health/live"):
        answer = await client.get(path)
        assert answer.status_code == 200
        assert NAME not in f"{answer.text}{answer.headers}"


async def test_paths_not_listed_as_public_require_a_key(service: KeyedService, client: httpx.AsyncClient) -> None:
    service.key()
    paths = ["/openapi.json", "/nothing", "/", "//svc/status", "/svc////metrics", "/health/"]
    assert [path for path in paths if (await client.get(f"http://localhost{path}")).status_code != 401] == []


async def test_response_to_rejected_client_reveals_no_version(service: KeyedService, client: httpx.AsyncClient) -> None:
    service.key()
    assert NAME not in str((await client.get("/v1/models")).headers)


async def test_only_admin_key_can_read_the_full_status(service: KeyedService, client: httpx.AsyncClient) -> None:
    inside = await client.get("/svc/status", headers=bearer(service.key(Scope.ADMIN).secret))
    outside = await client.get("/svc/status", headers=bearer(service.key(Scope.METRICS).secret))
    assert "pid" not in inside.json()  # the double has no paths to hide
    assert outside.json()["pid"] is None


async def test_expired_key_is_rejected(service: KeyedService, client: httpx.AsyncClient) -> None:
    issued = service.key(expires_at=datetime.now(UTC) + timedelta(seconds=0.05))
    await asyncio.sleep(0.06)
    answer = await client.post(CHAT_PATH, json=CHAT, headers=bearer(issued.secret))
    assert code_of(answer) == (401, "invalid_api_key")
    assert "expired" in answer.json()["error"]["message"]


async def test_key_sees_and_uses_only_its_allowed_models(service: KeyedService) -> None:
    async with service.client_of(service.key(models=frozenset({NAME}))) as mine:
        assert len((await mine.get("/v1/models")).json()["data"]) == 3
        assert (await mine.post(CHAT_PATH, json=CHAT)).headers["x-model-version"] == f"{NAME}@1"
        answer = await mine.post(CHAT_PATH, json=CHAT | {"model": "other"})
        assert code_of(answer) == (404, "model_not_found")


async def test_responses_reveal_nothing_about_models_a_key_may_not_use(service: KeyedService) -> None:
    async with service.client_of(service.key(models=frozenset({"mine"}))) as mine:
        listed = await mine.get("/v1/models")
        assert listed.json()["data"] == []
        assert NAME not in str(listed.headers)
        for model in (NAME, f"{NAME}@1", f"{NAME}@production", "mine", "nothing"):
            for answer in (
                await mine.get(f"/v1/models/{model}"),
                await mine.delete(f"/v1/models/{model}"),
                await mine.post(CHAT_PATH, json=CHAT | {"model": model}),
            ):
                assert code_of(answer) == (404, "model_not_found")
                assert NAME not in f"{answer.text}{answer.headers}".replace(f"{model!r}", "")
    assert service.double.requests == []


@pytest.mark.slow
async def test_api_key_can_rate_only_its_own_answers(service: KeyedService) -> None:
    one, other, admin = service.key(), service.key(), service.key(Scope.ADMIN)
    async with service.client_of(one) as client:
        request_id = (await client.post(CHAT_PATH, json=CHAT)).headers["x-request-id"]
    rating = {"request_id": request_id, "rating": "good"}
    async with service.client_of(other) as client:
        answer = await client.post("/v1/feedback", json=rating)
        nothing = await client.post("/v1/feedback", json=rating | {"request_id": "req-none"})
    assert code_of(answer) == code_of(nothing) == (404, "request_not_found")
    assert answer.json() == nothing.json()
    for issued in (one, admin):
        async with service.client_of(issued) as client:
            assert (await client.post("/v1/feedback", json=rating)).status_code == 200


async def test_invalid_keys_are_rate_limited_but_a_valid_key_still_works(
    service: KeyedService, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    issued = service.key()
    statuses = [
        (await client.get("/v1/models", headers=bearer(new_secret("nobody00")))).status_code
        for _ in range(MAX_INVALID_PER_MINUTE + 5)
    ]
    assert statuses == [401] * MAX_INVALID_PER_MINUTE + [429] * 5
    limited = await client.get("/v1/models")
    assert code_of(limited) == (429, "too_many_wrong_keys")
    assert 0 < int(limited.headers["retry-after"]) <= 60
    assert (await client.get("/v1/models", headers=bearer(issued.secret))).status_code == 200
    assert caplog.text.count("too many invalid API keys from 127.0.0.1") == 1
    assert service.count("svc_authentication_failures_total", fault=KeyFault.UNKNOWN) == MAX_INVALID_PER_MINUTE + 5
    assert service.count("svc_authentication_failures_total", fault=KeyFault.MISSING) == 1


async def call(service: KeyedService, secret: str, address: str) -> int:
    """Return the status code of a chat request, without the overhead of a real client."""
    body, statuses = json.dumps(CHAT).encode(), list[int]()
    coming = asyncio.Event()

    async def receive() -> Message:
        nonlocal body
        if not body:
            await coming.wait()
        sent, body = body, b""
        return {"type": "http.request", "body": sent, "more_body": False}

    async def send(message: Message) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"x-api-key", secret.encode())]
    scope = {"type": "http", "method": "POST", "path": CHAT_PATH, "client": (address, 1), "headers": headers}
    await service.app(scope | {"query_string": b"", "root_path": "", "app": service.app}, receive, send)
    return statuses[0]


async def cost(service: KeyedService, secret: str, count: int, addresses: int = 1) -> tuple[float, Counter[int]]:
    """Return the CPU time per request, plus the number of responses by status code."""
    began, statuses = time.process_time(), Counter[int]()
    for number in range(count):
        statuses[await call(service, secret, f"10.{addresses}.{count // 1000}.{number % addresses}")] += 1
    return (time.process_time() - began) / count, statuses


@pytest.mark.slow
async def test_rejecting_an_invalid_key_uses_less_cpu_time_than_a_valid_request(service: KeyedService) -> None:
    """The id in an invalid key may belong to a real key, so that their hashes are compared."""
    issued = service.key()
    right, statuses = await cost(service, issued.secret, 200)
    assert statuses == {200: 200}
    wrong = ((new_secret(issued.key.id), 10_000, 1), (new_secret("nobody00"), 2_000, 50), ("x" * 4000, 1_000, 1))
    for secret, count, addresses in wrong:
        each, statuses = await cost(service, secret, count, addresses)
        assert each < right
        assert statuses[401] == addresses * MAX_INVALID_PER_MINUTE
        assert statuses[429] == count - statuses[401]


@pytest.mark.slow
@pytest.mark.parametrize("route", Route)
async def test_stream_ends_within_one_second_when_its_key_is_revoked(service: KeyedService, route: Route) -> None:
    issued = service.key()
    service.double.token_delay_s = 0.05
    service.double.tokens = 1000
    following = asyncio.create_task(service.authenticator.follow(Changes()))
    async with service.socket_client() as client:
        body = {**BODIES[route], "stream": True}
        async with client.stream("POST", route.value, json=body, headers=bearer(issued.secret)) as answer:
            assert answer.status_code == 200
            parts = answer.aiter_text()
            text = await anext(parts)
            service.revoke(issued)
            began = time.monotonic()
            text += "".join([part async for part in parts])
    assert time.monotonic() - began < 1.0
    error = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))["error"]
    assert error["code"] == "invalid_api_key"
    assert issued.key.id in error["message"]
    assert "[DONE]" not in text
    await until(lambda: service.admission.running == 0)
    assert not service.authenticator._grants
    following.cancel()
    await asyncio.wait({following})


@pytest.mark.slow
async def test_revoking_a_key_cancels_only_its_own_queued_requests(service: KeyedService) -> None:
    issued, other = service.key(), service.key()
    following = asyncio.create_task(service.authenticator.follow(Changes()))
    async with service.client() as client:
        async with closed(service.admission):
            asked = [
                asyncio.create_task(client.post(CHAT_PATH, json=CHAT, headers=bearer(each.secret)))
                for each in (issued, other)
            ]
            await until(lambda: service.admission.queued == 2)
            service.revoke(issued)
            async with asyncio.timeout(1):
                answer = await asked[0]
            assert code_of(answer) == (401, "invalid_api_key")
        assert (await asked[1]).status_code == 200
    following.cancel()
    await asyncio.wait({following})


@pytest.mark.slow
async def test_running_requests_end_when_their_key_is_rotated_without_a_grace_period(
    service: KeyedService, store: Store
) -> None:
    issued = service.key()
    following = asyncio.create_task(service.authenticator.follow(Changes()))
    async with service.client_of(issued) as client, closed(service.admission):
        asked = asyncio.create_task(client.post(CHAT_PATH, json=CHAT))
        await until(lambda: service.admission.queued)
        Keyring(store, ALICE).rotate(issued.key.id)
        async with asyncio.timeout(1):
            assert (await asked).status_code == 401
    following.cancel()
    await asyncio.wait({following})


async def test_requests_are_rejected_if_keys_are_required_and_none_exists(service: KeyedService) -> None:
    """An example is a server that other machines can reach and whose store was lost."""
    authentication = Authentication(service.authenticator, keys_needed=True, on_failure=lambda fault: None)
    assert authentication.needs_key(RequestState("req-1", {}), "/metrics")
    with pytest.raises(InvalidKeyError):
        authentication.admit(RequestState("req-1", {}), "/metrics")


async def test_request_row_stores_the_id_of_its_key(service: KeyedService, store: Store) -> None:
    issued = service.key()
    async with service.client_of(issued) as client:
        await client.post(CHAT_PATH, json=CHAT)
    await asyncio.to_thread(service.request_log.flush, 5)
    with store.connect() as connection:
        rows = connection.exec_driver_sql("SELECT key_id FROM requests").all()
    assert rows == [(issued.key.id,)]


async def test_endpoint_raises_if_authentication_was_bypassed(service: KeyedService) -> None:
    """An example is an endpoint that was mounted outside the authentication layer."""
    routes = service.app.framework.router.routes
    endpoint = next(route.endpoint for route in routes if isinstance(route, routing.Route) and route.path == CHAT_PATH)
    with pytest.raises(RuntimeError):
        await endpoint({"type": "http", "state": {STATE_KEY: RequestState("req-1", {})}}, _unused, _unused)
    with pytest.raises(KeyError):
        await endpoint({"type": "http", "state": {}}, _unused, _unused)


async def _unused(*_: object) -> Any:
    raise AssertionError
