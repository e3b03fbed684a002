"""Tests the request log: every request leaves one row with its outcome."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from svc.settings.monitoring import RequestLogSettings
from svc.store.requests import hash_user
from svc.store.tables import RequestRow
from tests.serving.control import until
from tests.serving.engine_double import Fault
from tests.serving.service import CHAT, CHAT_PATH, NAME, STREAM, Service


@pytest.fixture
async def service(socket_folder: Path, store: Store) -> AsyncIterator[Service]:
    async with Service(socket_folder, store=store, keeping=RequestLogSettings(content_share=1.0)).run() as service:
        yield service


async def row_after(service: Service, client: httpx.AsyncClient, body: Any, path: str = CHAT_PATH) -> RequestRow:
    """Send a request and return the single row it leaves."""
    await client.post(path, json=body, headers={"x-request-id": "mine"})
    assert service.request_log.flush(5)
    assert service.store is not None
    with Session(service.store) as session:
        return session.scalars(select(RequestRow)).one()


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "streamed"])
async def test_request_row_is_complete_for_a_successful_answer(
    service: Service, client: httpx.AsyncClient, body: Any
) -> None:
    row = await row_after(service, client, body)
    assert (row.client_request_id, row.model, row.number, row.format) == ("mine", NAME, 1, "merged")
    assert row.request_id.startswith("req-")
    assert (row.route, row.status, row.reason, row.finish_reason) == (CHAT_PATH, 200, None, "length")
    assert row.tokens_out == 4
    assert row.tokens_in
    assert 0 < row.seconds < 5


async def test_outcome_in_the_request_row_is_engine_error_for_a_failed_stream(
    service: Service, client: httpx.AsyncClient
) -> None:
    service.double.fault = Fault.ERROR_IN_STREAM
    row = await row_after(service, client, STREAM)
    assert (row.status, row.reason, row.outcome) == (200, "engine_error", "engine_error")


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({"temperature": 0, "max_tokens": 3}, (0.0, 3)),
        ({"temperature": 0.5, "max_tokens": 9, "max_completion_tokens": 2}, (0.5, 2)),
        ({}, (None, None)),
        ({"max_tokens": 10**30, "temperature": 10**400, "model": "other"}, (None, None)),
    ],
)
async def test_request_row_stores_the_sampling_parameters(
    service: Service, client: httpx.AsyncClient, sent: Any, kept: tuple[float | None, int | None]
) -> None:
    row = await row_after(service, client, {**CHAT, **sent})
    assert (row.temperature, row.max_tokens, row.logprob) == (*kept, None)


@pytest.mark.parametrize(("sent", "kept"), [({}, None), ({"user": "a@b.de"}, hash_user("a@b.de"))])
async def test_request_row_stores_only_a_hash_of_the_user(
    service: Service, client: httpx.AsyncClient, sent: dict[str, str], kept: str | None
) -> None:
    assert (await row_after(service, client, {**CHAT, **sent})).user_hash == kept


async def test_only_streams_have_a_time_to_first_token(service: Service, client: httpx.AsyncClient) -> None:
    row = await row_after(service, client, STREAM)
    assert row.first_token_seconds is not None
    assert 0 < row.first_token_seconds <= row.seconds


async def test_prompt_and_answer_are_stored_if_content_is_enabled(service: Service, client: httpx.AsyncClient) -> None:
    row = await row_after(service, client, STREAM)
    assert row.prompt == '[{"role": "user", "content": "one two three"}]'
    assert row.answer
    assert row.answer.startswith("1.0")


async def test_stored_content_is_the_same_for_streamed_and_non_streamed_answers(
    service: Service, client: httpx.AsyncClient
) -> None:
    await client.post(CHAT_PATH, json=CHAT)
    await client.post(CHAT_PATH, json=STREAM)
    assert service.request_log.flush(5)
    assert service.store is not None
    with Session(service.store) as session:
        whole, streamed = session.scalars(select(RequestRow.answer))
    assert whole == streamed


async def test_no_content_is_stored_if_the_content_share_is_zero(socket_folder: Path, store: Store) -> None:
    async with Service(socket_folder, store=store).run() as service, service.client() as client:
        row = await row_after(service, client, STREAM)
    assert (row.prompt, row.answer) == (None, None)


async def test_request_row_for_an_unknown_model_has_no_version(service: Service, client: httpx.AsyncClient) -> None:
    row = await row_after(service, client, {**CHAT, "model": "a client's own text"})
    assert (row.model, row.number, row.status, row.reason) == ("unknown", None, 404, "model_not_found")
    assert row.prompt is None


async def test_request_row_names_the_model_if_the_version_is_unknown(
    service: Service, client: httpx.AsyncClient
) -> None:
    row = await row_after(service, client, {**CHAT, "model": f"{NAME}@99"})
    assert (row.model, row.number, row.status, row.reason) == (NAME, None, 404, "model_not_found")
    assert row.prompt is None


async def test_request_row_of_a_failed_stream_stores_the_reason(service: Service, client: httpx.AsyncClient) -> None:
    service.double.fault = Fault.ERROR_IN_STREAM
    row = await row_after(service, client, STREAM)
    assert (row.status, row.number) == (200, 1)
    assert row.reason in ("engine_error", "engine_died")


async def test_outcome_in_the_request_row_is_engine_error_if_the_server_stops_mid_answer(service: Service) -> None:
    service.double.token_delay_s = 0.05
    service.double.tokens = 1000
    sent = list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)

    answering = asyncio.create_task(service.app(_scope(), _receive_then_wait(json.dumps(STREAM).encode()), send))
    await until(lambda: len(sent) > 2)
    answering.cancel()
    await asyncio.wait([answering])
    assert service.request_log.flush(5)
    assert service.store is not None
    with Session(service.store) as session:
        row = session.scalars(select(RequestRow)).one()
    assert (row.status, row.reason) == (200, "engine_died")
    assert service.failed("engine_died") == 1


def _scope() -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": CHAT_PATH,
        "raw_path": CHAT_PATH.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }


def _receive_then_wait(body: bytes) -> Callable[[], Awaitable[Any]]:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        while not messages:
            await asyncio.sleep(3600)
        return messages.pop()

    return receive


async def test_request_row_stores_the_reason_for_a_rejected_body(service: Service, client: httpx.AsyncClient) -> None:
    row = await row_after(service, client, {**CHAT, "prompt_logprobs": 1})
    assert (row.status, row.reason) == (400, "invalid_request")


async def test_openmetrics_exemplars_contain_the_request_id(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT_PATH, json=STREAM)
    page = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert f'# {{request_id="{answer.headers["x-request-id"]}"}}' in page.text
