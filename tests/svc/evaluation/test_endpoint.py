"""Tests that a remote endpoint gets requests its provider accepts, and that its key is never shown."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from svc.dataset.schema.example import parse_example
from svc.errors import EngineError, SettingsError
from svc.evaluation.endpoint import Endpoint, ask_endpoint
from svc.evaluation.results import ExampleResult
from tests.svc.chats import chat, turn

KEY = "sk-very-secret"
ENDPOINT = Endpoint("https://elsewhere.example/v1", "big-model", KEY)
EXAMPLES = [chat("one", "yes"), chat("two", "no")]
Answer = Callable[[dict[str, Any]], httpx.Response]


class Provider:
    """A provider that answers `yes` to every request unless it is given other answers.

    Attributes:
        answers: answers that the first requests get instead.
    """

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.bodies.append(json.loads(request.content))
        return (self.answers.pop(0) if self.answers else yes)(self.bodies[-1])


def yes(body: dict[str, Any]) -> httpx.Response:
    choice = {"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
    return httpx.Response(200, json={"choices": [choice], "usage": {"completion_tokens": 2}})


def refused_option(text: str, option: str) -> Answer:
    """Return an answer that rejects every request containing the option."""
    return lambda body: httpx.Response(400, text=text) if option in body else yes(body)


def refusal(status: int, text: str, **headers: str) -> Answer:
    return lambda body: httpx.Response(status, text=text, headers=headers)


async def ask(provider: Provider, endpoint: Endpoint = ENDPOINT) -> tuple[ExampleResult, ...]:
    return await ask_endpoint(endpoint, EXAMPLES, limits=(8, 24), transport=httpx.MockTransport(provider))


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    made: list[float] = []

    async def sleep(seconds: float) -> None:
        made.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return made


async def test_every_example_is_sent_to_the_endpoint_and_its_answer_compared_with_the_reference() -> None:
    provider = Provider()
    results = await ask(provider)
    assert [result.hit for result in results] == [True, False]
    assert [str(request.url) for request in provider.requests] == ["https://elsewhere.example/v1/chat/completions"] * 2
    assert {request.headers["authorization"] for request in provider.requests} == {f"Bearer {KEY}"}
    first = provider.bodies[0]
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("big-model", 8, 0)
    assert first["messages"] == [{"role": "user", "content": "one"}]


async def test_each_request_has_its_own_token_limit() -> None:
    provider = Provider()
    results = await ask(provider)
    assert {body["messages"][0]["content"]: body["max_tokens"] for body in provider.bodies} == {"one": 8, "two": 24}
    assert [result.limit for result in results] == [8, 24]


async def test_no_api_key_is_sent_to_the_endpoint_when_none_is_configured() -> None:
    provider = Provider()
    await ask(provider, Endpoint("http://127.0.0.1:8000/v1", "mine"))
    assert "authorization" not in provider.requests[0].headers


@pytest.mark.parametrize(
    ("refused", "gone", "instead"),
    [
        ("'max_tokens' is not supported: use 'max_completion_tokens'", "max_tokens", "max_completion_tokens"),
        ("'temperature' does not support 0 with this model", "temperature", None),
    ],
)
async def test_request_is_retried_with_an_unsupported_option_replaced_or_omitted(
    refused: str, gone: str, instead: str | None, pauses: list[float]
) -> None:
    provider = Provider(*[refused_option(refused, gone)] * 4)
    results = await ask(provider)
    assert [result.answer for result in results] == ["yes", "yes"]
    for body in provider.bodies[-2:]:
        assert gone not in body
    assert instead is None or {body[instead] for body in provider.bodies[-2:]} == {8, 24}
    assert pauses == []


async def test_busy_endpoint_is_retried_after_the_requested_delay(pauses: list[float]) -> None:
    provider = Provider(refusal(429, "slow down", **{"retry-after": "7"}), refusal(503, "overloaded"))
    assert len(await ask(provider)) == 2
    assert pauses == [7, 2]


async def test_permanently_busy_endpoint_raises_error() -> None:
    provider = Provider(*[refusal(503, "overloaded")] * 20)
    with pytest.raises(EngineError, match="responded with status 503: overloaded"):
        await ask(provider)


async def test_rejected_request_is_not_retried_and_its_error_omits_the_api_key() -> None:
    provider = Provider(*[refusal(401, f"Incorrect API key provided: {KEY}")] * 20)
    with pytest.raises(
        EngineError, match=r"big-model at https://elsewhere\.example/v1 responded with status 401"
    ) as raised:
        await ask(provider)
    assert KEY not in str(raised.value) + repr(raised.value) + repr(ENDPOINT)


async def test_no_further_request_is_sent_to_an_endpoint_after_a_rejection() -> None:
    asked: list[httpx.Request] = []

    async def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        loop = asyncio.get_running_loop()
        answered = loop.create_future()
        loop.call_later(0.001, answered.set_result, None)  # like a network, with a delay
        await answered
        return httpx.Response(401, text="no")

    examples = [chat(f"question {number}") for number in range(100)]
    with pytest.raises(EngineError, match="responded with status 401"):
        await ask_endpoint(ENDPOINT, examples, limits=[8] * len(examples), transport=httpx.MockTransport(refuse))
    assert len(asked) < 30


async def test_request_in_progress_is_cancelled_when_another_is_rejected() -> None:
    waiting, cancelled = asyncio.Event(), asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        if b"refused" in request.content:
            await waiting.wait()
            return httpx.Response(401, text="no")
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return httpx.Response(200)

    with pytest.raises(EngineError, match="responded with status 401"):
        await ask_endpoint(
            ENDPOINT, [chat("refused"), chat("slow")], limits=(8, 8), transport=httpx.MockTransport(answer)
        )
    await asyncio.wait_for(cancelled.wait(), timeout=5)


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": [{"message": None}]}, []])
async def test_malformed_endpoint_response_raises_error(body: Any) -> None:
    with pytest.raises(EngineError, match="responded with "):
        await ask(Provider(lambda _: httpx.Response(200, json=body)))


async def test_unreachable_endpoint_raises_error() -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(EngineError, match="is not responding: ConnectError refused"):
        await ask_endpoint(ENDPOINT, EXAMPLES, limits=(8, 8), transport=httpx.MockTransport(away))


@pytest.mark.parametrize("slash", ["", "/"])
def test_endpoint_is_parsed_from_a_url_with_the_model_as_fragment(slash: str) -> None:
    assert Endpoint.parse(f"https://host/v1{slash}#org/model-1", None) == Endpoint("https://host/v1", "org/model-1")


@pytest.mark.parametrize("text", ["https://host/v1", "ftp://host/v1#m", "https://#m", "https://me:pw@host/v1#m"])
def test_invalid_endpoint_url_is_rejected_without_quoting_it(text: str) -> None:
    with pytest.raises(SettingsError) as raised:
        Endpoint.parse(text, None)
    assert text not in str(raised.value)


def test_api_key_is_not_sent_over_an_unencrypted_network_connection() -> None:
    with pytest.raises(SettingsError, match="unencrypted"):
        Endpoint.parse("http://host/v1#m", KEY)
    assert Endpoint.parse("http://127.0.0.1:8000/v1#m", KEY).key == KEY


async def test_endpoint_may_call_tools_only_if_a_reference_answer_calls_a_tool() -> None:
    def calls(body: dict[str, Any]) -> httpx.Response:
        answer = yes(body).json()
        answer["choices"][0]["message"] = {"tool_calls": [{"function": {"name": "rain", "arguments": "{ }"}}]}
        return httpx.Response(200, json=answer)

    provider, tools = Provider(yes, calls, yes), [{"name": "rain"}]
    calling = {"role": "assistant", "tool_calls": [{"function": {"name": "rain"}}]}
    rain = parse_example({"messages": [turn("user", "one"), calling], "tools": tools})
    text = parse_example({"messages": [turn("user", "two"), turn("assistant", "yes")], "tools": tools})
    transport = httpx.MockTransport(provider)
    await ask_endpoint(ENDPOINT, [text], limits=[8], transport=transport)
    [result] = await ask_endpoint(ENDPOINT, [rain], limits=[8], transport=transport)
    await ask_endpoint(ENDPOINT, [rain, text], limits=[8, 8], transport=transport)
    assert [body["tool_choice"] for body in provider.bodies] == ["none", "auto", "auto", "auto"]
    assert (result.answer, result.hit) == ('{"name": "rain", "arguments": {}}', True)


async def test_thinking_in_reference_answers_is_neither_sent_to_the_endpoint_nor_compared() -> None:
    def thinks(body: dict[str, Any]) -> httpx.Response:
        answer = yes(body).json()
        answer["choices"][0]["message"]["content"] = "<think>\nIs it?\n</think>\n\nyes"
        return httpx.Response(200, json=answer)

    provider, thought = Provider(thinks, thinks), {"role": "assistant", "reasoning_content": "It is.", "content": "yes"}
    asked = parse_example({"messages": [turn("user", "one"), thought, turn("user", "two"), thought]})
    transport = httpx.MockTransport(provider)
    with_thinking, without = await ask_endpoint(
        ENDPOINT, [asked, chat("one", "yes")], limits=(8, 8), transport=transport
    )
    assert (with_thinking.answer, with_thinking.hit) == ("yes", True)
    assert not without.hit
    assert [message.keys() for message in provider.bodies[0]["messages"]] == [{"role", "content"}] * 3
