"""Tests that the benchmark's upstream answers OpenAI's client like vLLM, at the configured pace."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from benchmarks.gateway.peers import free_port
from benchmarks.gateway.upstream import MODEL, serve

ASKED: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "one"}]


@asynccontextmanager
async def upstream() -> AsyncIterator[Path]:
    """Run the upstream and yield its socket."""
    async with _listening() as (socket, _):
        yield socket


@asynccontextmanager
async def client() -> AsyncIterator[AsyncOpenAI]:
    """Return an OpenAI client for the upstream."""
    async with (
        _listening() as (_, port),
        AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as openai,
    ):
        yield openai


@asynccontextmanager
async def _listening() -> AsyncIterator[tuple[Path, int]]:
    with TemporaryDirectory(prefix="gw") as folder:
        socket, port = Path(folder) / "upstream.sock", free_port()
        ready = asyncio.Event()
        task = asyncio.create_task(serve(socket, port, on_ready=ready.set))
        try:
            await ready.wait()
            yield socket, port
        finally:
            task.cancel()
            await asyncio.wait({task})


@pytest.mark.slow
async def test_openai_client_reads_complete_response_from_fake_upstream() -> None:
    async with client() as openai:
        answer = await openai.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=3)
    assert answer.choices[0].message.content == "token token token"
    assert answer.usage is not None and answer.usage.completion_tokens == 3


@pytest.mark.parametrize("usage", [True, False])
async def test_openai_client_reads_stream_from_fake_upstream(usage: bool) -> None:
    async with client() as openai:
        stream = await openai.chat.completions.create(
            model=MODEL, messages=ASKED, max_tokens=3, stream=True, stream_options={"include_usage": usage}
        )
        chunks = [chunk async for chunk in stream]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert [choice.delta.content for choice in choices] == ["", " token", " token", " token"]
    assert choices[0].delta.role == "assistant" and choices[-1].finish_reason == "length"
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [3] * usage


async def test_upstream_sends_chunks_at_the_configured_pace() -> None:
    body = {"model": MODEL, "messages": ASKED, "max_tokens": 4, "stream": True}
    async with (
        upstream() as socket,
        httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(socket)), base_url="http://upstream") as http,
    ):
        await http.post("/pace", content="0.05")
        began = time.monotonic()
        await http.post("/v1/chat/completions", json=body)
    assert time.monotonic() - began >= 3 * 0.05


async def test_request_received_in_several_chunks_gets_one_response() -> None:
    body = b'{"messages":[],"max_tokens":1}'
    request = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    async with upstream() as socket:
        reader, writer = await asyncio.open_unix_connection(socket)
        for at in range(len(request)):
            writer.write(request[at : at + 1])
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            heads = [await reader.readuntil(b"\r\n\r\n")]
            await reader.readuntil(b'"kv_transfer_params":null}')
            writer.write(b"GET /health HTTP/1.1\r\n\r\n")
            heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.close()
    assert [head.partition(b"\r\n")[0] for head in heads] == [b"HTTP/1.1 200 OK"] * 2
