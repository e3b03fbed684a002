"""Tests the measurement against an engine double with known times."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from serving.sizing.measure import LoadClient, levels, measure
from svc.errors import EngineError

STEP_S, TOKEN_S = 0.01, 0.0005


def _event(**content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


async def _answer(request: httpx.Request) -> httpx.Response:
    """Answer like vLLM: the prompt takes its time, then each token takes a step."""
    body = json.loads(request.content)

    async def stream() -> AsyncIterator[bytes]:
        await asyncio.sleep(STEP_S + TOKEN_S * len(body["prompt"]))
        for _ in range(body["max_tokens"]):
            yield _event(choices=[{"text": "a"}])
            await asyncio.sleep(STEP_S)
        yield _event(choices=[], usage={"completion_tokens": body["max_tokens"]})
        yield b"data: [DONE]\n\n"

    return httpx.Response(200, content=stream())


def client(transport: httpx.AsyncBaseTransport) -> LoadClient:
    return LoadClient(httpx.AsyncClient(transport=transport, base_url="http://engine"), "/v1/completions", "bot")


async def test_measurement_finds_the_times_of_steps_and_prompts() -> None:
    done: list[None] = []
    times = await measure(
        client(httpx.MockTransport(_answer)),
        prompt=160,
        answer=5,
        concurrency=3,
        label="bot",
        on_step=lambda: done.append(None),
    )
    assert [point.count for point in times.decoding] == levels(3) == [1, 2, 3]
    assert len(done) == len(levels(3)) + 2
    assert all(STEP_S <= point.seconds < 3 * STEP_S for point in times.decoding)
    assert times.prefill_token_s == pytest.approx(TOKEN_S, rel=0.4)


async def test_rejected_request_is_an_error_with_the_reason() -> None:
    rejecting = httpx.MockTransport(lambda _: httpx.Response(404, json={"error": {"message": "no such model"}}))
    with pytest.raises(EngineError, match="no such model"):
        await client(rejecting).ask([1], 2)


async def test_shorter_answer_than_asked_for_is_an_error() -> None:
    events = _event(choices=[{"text": "a"}]) + _event(choices=[], usage={"completion_tokens": 1})
    with pytest.raises(EngineError, match="answered with 1 tokens"):
        await client(httpx.MockTransport(lambda _: httpx.Response(200, content=events))).ask([1], 2)
