"""An answer that is written directly has the lines that ASGI's messages make, and its connection goes on."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from serving.http.direct_answer import DirectAnswer, direct_answer
from serving.http.header_lines import headers_in
from serving.http.http_server import http_server

HEADERS = b"content-type: text/plain\r\nx-own: 1\r\n"
COMMON = b"x-common: 2\r\n"
WHOLE, PARTS = b"/whole", b"/parts"
BODY = b"what was asked"


class Echo:
    """Answers with the body of the request: whole, or in three parts.

    Args:
        ways: for each part of an answer in turn whether it is written directly.
    """

    def __init__(self, ways: Sequence[bool]) -> None:
        self._ways = ways

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        direct = direct_answer(scope)
        assert direct is not None
        direct.common_headers = lambda: COMMON
        body = direct.take_body()
        while body is None:
            await asyncio.sleep(0.01)
            body = direct.take_body()
        if scope["path"].encode() == WHOLE:
            await self._whole(direct, send, body)
        else:
            await self._parts(direct, send, body)

    async def _whole(self, direct: DirectAnswer, send: Send, body: bytes) -> None:
        if self._ways[0]:
            direct.write_whole(HEADERS, body)
            return
        headers = headers_in(HEADERS + COMMON + b"content-length: %d\r\n" % len(body))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _parts(self, direct: DirectAnswer, send: Send, body: bytes) -> None:
        begins, goes_on, ends = self._ways
        if begins:
            direct.begin(HEADERS, body)
        else:
            headers = headers_in(HEADERS + COMMON)
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": True})
        assert direct.begun
        if goes_on:
            direct.write(body)
        else:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if ends:
            direct.end()
        else:
            await send({"type": "http.response.body", "body": b""})


def request(path: bytes, more: bytes = b"", version: bytes = b"1.1") -> bytes:
    length = b"content-length: %d\r\n" % len(BODY)
    return b"POST %b HTTP/%b\r\nhost: x\r\n%b%b\r\n%b" % (path, version, more, length, BODY)


@asynccontextmanager
async def connected(app: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """One connection to a server of an application."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = http_server(app, 4, idle_s=1)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        yield reader, writer
        writer.close()
        server.stop()
        await task


async def answered(app: Any, sent: Sequence[bytes]) -> bytes:
    """All that a server writes on one connection until it closes that, without its clock."""
    async with connected(app) as (reader, writer):
        for part in sent:
            writer.write(part)
            await asyncio.sleep(0.02)
        found = await reader.read()
    return re.sub(rb"date: [^\r]*", b"date: now", found)


LAST = b"connection: close\r\n"
SENT = {
    "one": [request(WHOLE, LAST)],
    "one in parts": [request(PARTS, LAST)],
    "one after the other": [request(WHOLE), request(PARTS), request(WHOLE, LAST)],
    "at once": [request(PARTS) + request(WHOLE) + request(WHOLE, LAST)],
    "in pieces": [request(WHOLE)[:-3], request(WHOLE)[-3:] + request(PARTS, LAST)],
    "an old client": [request(WHOLE, version=b"1.0")],
    "one that asks first": [request(WHOLE, b"expect: 100-continue\r\n" + LAST)],
}


@pytest.mark.parametrize("sent", SENT.values(), ids=SENT)
async def test_it_is_what_messages_make(sent: Sequence[bytes]) -> None:
    by_messages = await answered(Echo([False] * 3), sent)
    assert by_messages.count(BODY) >= len(sent)
    assert sorted(by_messages.split(b"\r\n")) == sorted((await answered(Echo([True] * 3), sent)).split(b"\r\n"))


@pytest.mark.parametrize(
    "ways", [(True, False, False), (True, False, True), (False, True, False), (False, False, True)]
)
async def test_an_answer_may_go_on_in_the_other_way(ways: Sequence[bool]) -> None:
    sent = SENT["one after the other"][1:]
    by_messages = await answered(Echo([False] * 3), sent)
    mixed = await answered(Echo(ways), sent)
    assert sorted(by_messages.split(b"\r\n")) == sorted(mixed.split(b"\r\n"))


async def test_one_whose_client_has_gone_is_forgotten() -> None:
    ended = asyncio.Event()

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        direct = direct_answer(scope)
        assert direct is not None
        while (await receive())["type"] != "http.disconnect":
            pass
        assert direct.take_body() is None
        direct.write_whole(HEADERS, BODY)
        assert not direct.begun
        ended.set()

    async with connected(late) as (_, writer):
        writer.write(request(WHOLE))
        await writer.drain()
        writer.close()
        await asyncio.wait_for(ended.wait(), 5)


async def test_an_answer_whose_head_cannot_be_made_has_not_begun() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        direct = direct_answer(scope)
        assert direct is not None
        direct.common_headers = lambda: b"%d" % (1 // 0)
        with pytest.raises(ZeroDivisionError):
            direct.write_whole(HEADERS, BODY)
        assert not direct.begun
        await send({"type": "http.response.start", "status": 500, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"sorry"})

    async with connected(failing) as (reader, writer):
        writer.write(request(WHOLE))
        found = await reader.read()
    assert found.startswith(b"HTTP/1.1 500")
    assert b"sorry" in found
