"""Tests that responses and messages are handled like chat completions, each in its own format."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from svc.settings.monitoring import RequestLogSettings
from svc.store.tables import RequestRow
from tests.serving.control import until
from tests.serving.engine_double import Fault
from tests.serving.service import NAME, TWO, Service, closed, error_of

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    MESSAGES: {"model": NAME, "messages": [{"role": "user", "content": "one two three"}], "max_tokens": 4},
    RESPONSES: {"model": NAME, "input": "one two three", "max_output_tokens": 4},
}
both = pytest.mark.parametrize("path", list(BODIES))
whole_and_streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
VERSION = {"model": NAME, "version": "1"}


@pytest.fixture
async def service(socket_folder: Any, store: Store) -> AsyncIterator[Service]:
    async with Service(socket_folder, store=store, keeping=RequestLogSettings(content_share=1.0)).run() as service:
        yield service


async def row_of(service: Service) -> RequestRow:
    assert await asyncio.to_thread(service.request_log.flush, 5)
    assert service.store is not None
    with Session(service.store) as session:
        return session.scalars(select(RequestRow)).one()


def last_event(text: str) -> tuple[str, Any]:
    name, data = text.strip().split("\n\n")[-1].split("\n")
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@both
@whole_and_streamed
async def test_engine_response_bytes_are_forwarded_unchanged_on_every_route(
    service: Service, client: httpx.AsyncClient, path: str, stream: bool
) -> None:
    body = {**BODIES[path], "stream": stream}
    answer = await client.post(path, json=body)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(service.double), base_url="http://e") as engine:
        assert answer.content == (await engine.post(path, json=body)).content
    assert answer.headers["x-request-id"] == service.double.request_ids[0]
    assert answer.headers["x-model-version"] == f"{NAME}@1"


@both
@whole_and_streamed
async def test_requests_to_the_messages_and_responses_routes_are_stored_like_chat_requests(
    service: Service, client: httpx.AsyncClient, path: str, stream: bool
) -> None:
    await client.post(path, json={**BODIES[path], "stream": stream, "temperature": 0.5})
    row = await row_of(service)
    assert (row.route, row.status, row.reason, row.finish_reason) == (path, 200, None, "length")
    assert (row.tokens_in, row.tokens_out, row.temperature, row.max_tokens) == (3, 4, 0.5, 4)
    assert (row.first_token_seconds is not None) is stream
    assert row.prompt == '[{"role": "user", "content": "one two three"}]'
    assert row.answer == "1.0 1.1 1.2 1.3 "


@both
async def test_tokens_are_counted_and_timed_on_every_route(
    service: Service, client: httpx.AsyncClient, path: str
) -> None:
    await client.post(path, json=BODIES[path])
    await client.post(path, json={**BODIES[path], "stream": True})
    labels = {**VERSION, "route": path, "status": "200", "outcome": "complete"}
    assert service.count("svc_requests_total", **labels) == 2
    assert service.count("svc_tokens_total", **VERSION, direction="in") == 6
    assert service.count("svc_tokens_total", **VERSION, direction="out") == 8
    assert service.count("svc_time_to_first_token_seconds_count", **VERSION) == 1
    assert service.count("svc_time_between_tokens_seconds_count", **VERSION) == 3


@both
async def test_queued_request_is_answered_by_the_new_version_after_a_swap(
    service: Service, client: httpx.AsyncClient, path: str
) -> None:
    async with closed(service.admission):
        task = asyncio.create_task(client.post(path, json=BODIES[path]))
        await until(lambda: service.admission.queued == 1)
        service.double.weights = service.double.cached_weights = "/models/tuned/2"
        service.load(TWO)
    answer = await task
    assert answer.headers["x-model-version"] == f"{NAME}@2"
    assert "2.0 " in answer.text


@both
async def test_overlong_prompt_returns_context_length_exceeded(
    service: Service, client: httpx.AsyncClient, path: str
) -> None:
    service.double.max_model_len = 2
    answer = await client.post(path, json=BODIES[path])
    assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")
    assert error_of(answer)["param"] == "input_tokens"


@pytest.mark.parametrize(
    ("path", "fault", "code"),
    [
        (MESSAGES, Fault.DIE_IN_STREAM, "engine_died"),
        (MESSAGES, Fault.END_WITHOUT_DONE, "engine_died"),
        (RESPONSES, Fault.END_WITHOUT_DONE, "engine_died"),
        (RESPONSES, Fault.ERROR_IN_STREAM, "engine_error"),
    ],
)
async def test_stream_ends_with_an_error_if_the_engine_aborts_it(
    service: Service, client: httpx.AsyncClient, path: str, fault: Fault, code: str
) -> None:
    service.double.fault = fault
    answer = await client.post(path, json={**BODIES[path], "stream": True})
    name, data = last_event(answer.text)
    assert (name, data["type"], data["error"]["code"]) == ("error", "error", code)
    assert "secret" not in answer.text
    assert service.failed_anywhere(code) == 1
    assert service.admission.running == 0


async def test_messages_stream_ends_with_engine_died_if_the_engine_dies(
    service: Service, client: httpx.AsyncClient
) -> None:
    service.double.fault, service.double.dead = Fault.ERROR_IN_STREAM, True
    answer = await client.post(MESSAGES, json={**BODIES[MESSAGES], "stream": True})
    assert last_event(answer.text)[1]["error"]["code"] == "engine_died"


@both
async def test_text_sent_before_a_stream_failure_is_stored(
    service: Service, client: httpx.AsyncClient, path: str
) -> None:
    service.double.fault = Fault.DIE_IN_STREAM
    await client.post(path, json={**BODIES[path], "stream": True})
    row = await row_of(service)
    assert (row.status, row.reason, row.finish_reason, row.answer) == (200, "engine_died", None, "1.0 1.1 ")


@both
@whole_and_streamed
async def test_engine_work_is_cancelled_when_the_client_disconnects(service: Service, path: str, stream: bool) -> None:
    service.double.token_delay_s = 0.02
    service.double.tokens = 1000
    body = {**BODIES[path], "stream": stream, "max_tokens": 1000, "max_output_tokens": 1000}
    async with service.socket_client() as live:
        task = asyncio.create_task(live.post(path, json=body))
        await until(lambda: service.double.running == 1)
        task.cancel()
        await until(lambda: service.double.cancelled == 1 and service.admission.running == 0)
        await until(lambda: service.failed_anywhere("client_gone") == 1)


@both
async def test_request_is_complete_if_client_disconnects_after_the_last_event(service: Service, path: str) -> None:
    service.double.linger_s = 60
    async with (
        service.socket_client() as live,
        live.stream("POST", path, json={**BODIES[path], "stream": True}) as answer,
    ):
        async for line in answer.aiter_lines():
            if line in ("event: response.completed", "event: message_stop"):
                break
    labels = {**VERSION, "route": path, "status": "200", "outcome": "complete"}
    await until(lambda: service.count("svc_requests_total", **labels) == 1)
    assert service.failed_anywhere("client_gone") == 0


async def test_requests_for_stored_or_background_responses_never_reach_the_engine(
    service: Service, client: httpx.AsyncClient
) -> None:
    for field in ("background", "store", "previous_response_id", "conversation"):
        answer = await client.post(RESPONSES, json={**BODIES[RESPONSES], field: True})
        assert (answer.status_code, error_of(answer)["param"]) == (400, field), field
        assert service.double.calls == [], field
