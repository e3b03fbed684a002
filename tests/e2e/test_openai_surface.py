"""Tests responses, messages and closed routes with the real engine."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from svc.dataset.schema.tool_calls import calls_in
from svc.engine.vllm.folders import socket_folder
from svc.engine.vllm.launch import SOCKET_FILE
from svc.store.database import open_database
from svc.store.tables import RequestRow
from tests.builders.routes import CLOSED, OURS
from tests.e2e.server import Server

pytestmark = [pytest.mark.slow]

TOO_LONG = "long " * 5000
CITY = {"enum": ["Rome"]}
CHOICE = {"enum": ["yes", "no"]}


@pytest.fixture
def engine(server: Server) -> Iterator[httpx.Client]:
    """Yield a client connected directly to the engine."""
    transport = httpx.HTTPTransport(uds=str(socket_folder(server.home, 0) / SOCKET_FILE))
    with httpx.Client(transport=transport, base_url="http://engine") as client:
        yield client


def message_body(server: Server, **options: Any) -> dict[str, Any]:
    system, turns = server.prompts[0][:-1], server.prompts[0][-1:]
    body = {"model": "tiny", "messages": turns, "max_tokens": 24, "temperature": 0, **options}
    return body | ({"system": system[0]["content"]} if system else {})


def row_of(server: Server, request_id: str) -> RequestRow:
    """Return a request's row, which is written slightly after the response."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with Session(open_database(server.home)) as session:
            row = session.scalar(select(RequestRow).where(RequestRow.client_request_id == request_id))
        if row:
            return row
        time.sleep(0.2)
    raise AssertionError(f"no row of {request_id}")


def test_responses_api_returns_the_same_text_as_chat_completions(server: Server) -> None:
    turns: Any = server.prompts[0]
    expected = server.answer(0)
    asked: dict[str, Any] = {"model": "tiny", "input": turns, "max_output_tokens": 24, "temperature": 0}
    whole = server.client.responses.create(**asked)
    with server.client.responses.stream(**asked, extra_headers={"x-request-id": "streamed-response"}) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        last = stream.get_final_response()
    assert whole.output_text == last.output_text == "".join(deltas) == expected
    assert whole.usage is not None
    assert last.usage is not None
    row = row_of(server, "streamed-response")
    assert (row.status, row.reason, row.route) == (200, None, "/v1/responses")
    assert (row.tokens_in, row.tokens_out) == (last.usage.input_tokens, last.usage.output_tokens)
    assert row.finish_reason == ("length" if last.status == "incomplete" else "stop")
    assert (row.temperature, row.max_tokens) == (0, 24)
    assert row.first_token_seconds is not None
    assert json.loads(row.prompt or "") == turns
    assert row.answer == expected


def test_messages_api_returns_the_same_text_as_chat_completions(server: Server) -> None:
    expected = server.answer(0)
    whole = httpx.post(f"{server.url}/v1/messages", json=message_body(server), timeout=60).json()
    streamed = httpx.post(
        f"{server.url}/v1/messages",
        json=message_body(server, stream=True),
        headers={"x-request-id": "streamed-message"},
        timeout=60,
    ).text
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if line.startswith("data: ")]
    texts = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert whole["content"][0]["text"] == "".join(texts) == expected
    assert events[-1]["type"] == "message_stop"
    row = row_of(server, "streamed-message")
    assert (row.status, row.reason, row.route) == (200, None, "/v1/messages")
    assert (row.tokens_in, row.tokens_out) == (whole["usage"]["input_tokens"], whole["usage"]["output_tokens"])
    assert row.finish_reason == {"max_tokens": "length", "end_turn": "stop"}[whole["stop_reason"]]
    assert json.loads(row.prompt or "") == server.prompts[0]
    assert row.answer == expected


def calls(path: str) -> dict[str, Any]:
    """Return the body of a request that requires the model to call a tool."""
    schema = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
    function = {"name": "rain", "parameters": schema}
    turns = [{"role": "user", "content": "Rain?"}]
    match path:
        case "/v1/chat/completions":
            choice = {"type": "function", "function": {"name": "rain"}}
            return {"messages": turns, "tools": [{"type": "function", "function": function}], "tool_choice": choice}
        case "/v1/responses":
            choice = {"type": "function", "name": "rain"}
            return {"input": turns, "tools": [{"type": "function", **function}], "tool_choice": choice}
        case _:
            choice, tools = {"type": "tool", "name": "rain"}, [{"name": "rain", "input_schema": schema}]
            return {"messages": turns, "tools": tools, "tool_choice": choice, "max_tokens": 64}


@pytest.mark.parametrize(
    ("path", "stream"),
    [
        ("/v1/chat/completions", False),
        ("/v1/chat/completions", True),
        ("/v1/responses", False),
        ("/v1/responses", True),
        ("/v1/messages", True),  # not streamed, the arguments must be an object
    ],
)
def test_tool_call_is_stored_in_the_same_format_as_reference_answers(server: Server, path: str, stream: bool) -> None:
    name, body = f"call-{path.rpartition('/')[2]}-{stream}", {"model": "tiny", "temperature": 0, "stream": stream}
    answer = httpx.post(f"{server.url}{path}", json=body | calls(path), headers={"x-request-id": name}, timeout=60)
    assert answer.status_code == 200, answer.text
    stored = row_of(server, name).answer or ""
    assert [tool for tool, _ in calls_in(stored)] == ["rain"], stored


@pytest.mark.parametrize("stream", [False, True])
def test_overlong_prompt_returns_400_on_responses_and_messages(server: Server, stream: bool) -> None:
    for path, body in (
        ("/v1/responses", {"model": "tiny", "input": TOO_LONG}),
        ("/v1/messages", message_body(server, messages=[{"role": "user", "content": TOO_LONG}])),
    ):
        answer = httpx.post(f"{server.url}{path}", json={**body, "stream": stream}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_engine_stays_alive_when_a_streamed_response_fails(server: Server) -> None:
    bad: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}
    stream = server.client.responses.create(model="tiny", input="hi", text=bad, stream=True)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "engine_error"
    assert server.answer(0)


def test_json_schemas_and_logprobs_and_multiple_answers_per_request_are_supported(server: Server) -> None:
    messages: Any = server.prompts[0]
    schema: Any = {"type": "json_schema", "json_schema": {"name": "choice", "schema": CHOICE}}
    chat = server.client.chat.completions.create(
        model="tiny", messages=messages, response_format=schema, n=2, logprobs=True, top_logprobs=2, max_tokens=24
    )
    assert [json.loads(choice.message.content or "") in CHOICE["enum"] for choice in chat.choices] == [True, True]
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    text: Any = {"format": {"type": "json_schema", "name": "choice", "schema": CHOICE}}
    response = server.client.responses.create(model="tiny", input="yes or no?", text=text, max_output_tokens=24)
    assert json.loads(response.output_text) in CHOICE["enum"]


GENERATED = "vllm:generation_tokens_total"


def test_engine_stops_generating_when_a_client_disconnects(server: Server, engine: httpx.Client) -> None:
    """The engine would otherwise generate 800 tokens. The server's own concurrent requests generate fewer."""
    body = {"model": "tiny", "input": "hi", "stream": True, "max_output_tokens": 800, "ignore_eos": True}
    before = total(engine, GENERATED)
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if "delta" in line:
                break
    deadline = time.monotonic() + 60
    while total(engine, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert total(engine, GENERATED) - before < 500


def total(engine: httpx.Client, metric: str) -> float:
    """Return the current value of one of the engine's metrics."""
    values = [line.split()[-1] for line in engine.get("/metrics").text.splitlines() if line.startswith(metric)]
    assert values, f"vLLM has no {metric}"
    return sum(map(float, values))


def test_every_engine_route_is_either_served_or_explicitly_blocked(engine: httpx.Client) -> None:
    paths = engine.get("/openapi.json").json()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert {route.replace("{response_id}", "resp_1") for route in routes} <= {*CLOSED, *OURS}


def test_engine_development_routes_are_not_exposed_by_the_gateway(server: Server, engine: httpx.Client) -> None:
    assert engine.get("/is_sleeping").status_code == 200
    for route in CLOSED:
        method, path = route.split()
        assert httpx.request(method, f"{server.url}{path}", json={}).status_code in (404, 405)
