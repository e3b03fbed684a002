"""Tests the measurement against an engine double with known times."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import AsyncMock, MagicMock

import httpx
import pytest

from serving.engines.ray.identity import client_context, make_identity
from serving.sizing import measure as measure_module
from serving.sizing.measure import LoadClient, engine_client, levels, measure
from svc.engine.address import TlsAddress
from svc.errors import EngineError
from svc.settings.settings import Settings
from svc.version import Format, Target, VersionId

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


@pytest.mark.slow
async def test_measurement_yields_the_decode_step_time_and_prompt_time_of_an_engine() -> None:
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


async def test_rejected_request_fails_the_measurement_with_the_reason() -> None:
    rejecting = httpx.MockTransport(lambda _: httpx.Response(404, json={"error": {"message": "no such model"}}))
    with pytest.raises(EngineError, match="no such model"):
        await client(rejecting).ask([1], 2)


async def test_answer_shorter_than_requested_fails_the_measurement() -> None:
    events = _event(choices=[{"text": "a"}]) + _event(choices=[], usage={"completion_tokens": 1})
    with pytest.raises(EngineError, match="answered with 1 tokens"):
        await client(httpx.MockTransport(lambda _: httpx.Response(200, content=events))).ask([1], 2)


@pytest.mark.slow
async def test_remote_engine_is_measured_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = make_identity()
    context = client_context(identity, identity.certificate)
    engine = MagicMock(start=AsyncMock(), stop=AsyncMock(), address=TlsAddress("10.0.0.7", 4711, context))
    monkeypatch.setattr(measure_module, "EngineSlots", lambda *_: MagicMock(engine=lambda *_: engine))
    monkeypatch.setattr(measure_module, "served_model", lambda *_: None)
    monkeypatch.setattr(measure_module, "read_capabilities", lambda _: None)
    target = Target(VersionId("bot", 1), Format.MERGED)
    async with engine_client(Settings(home=tmp_path), target) as client:
        assert str(client.http.base_url) == "https://10.0.0.7:4711"
