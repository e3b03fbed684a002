"""Tests that connections are limited in number and closed without requests, unless they are active."""

import asyncio
import gc
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import pytest

from serving.http.connections import ClientProtocol, connection_of, raise_descriptor_limit
from serving.http.request_parser import MAX_HEAD_BYTES, MAX_WAITING
from serving.server.http_server import HttpServer

pytestmark = pytest.mark.slow

DEADLINE_S = 0.3
LARGE = 2**24
ASK = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def slow_app(scope: Any, receive: Any, send: Any) -> None:
    """An application that takes longer than the deadline."""
    await asyncio.sleep(2 * DEADLINE_S)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def large_app(scope: Any, receive: Any, send: Any) -> None:
    """An application that responds with more bytes than the buffers between client and server can hold."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % LARGE)]})
    await send({"type": "http.response.body", "body": b"x" * LARGE})


async def cutting_app(scope: Any, receive: Any, send: Any) -> None:
    """An application that begins a large response and then ends the connection."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x" * LARGE, "more_body": True})
    connection_of(scope).abort()
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def serving(most: int, app: Any = slow_app, deadline_s: float = DEADLINE_S) -> AsyncIterator[Connect]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = HttpServer(app, most, deadline_s=deadline_s, idle_s=1)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        writers: list[asyncio.StreamWriter] = []

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writers.append(writer)
            return reader, writer

        yield connect
        for writer in writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        server.stop()
        await task


async def ended(reader: asyncio.StreamReader) -> bool:
    """Return whether the server closed the connection within an ample time."""
    try:
        async with asyncio.timeout(5 * DEADLINE_S):
            return await reader.read() == b""
    except ConnectionResetError:
        return True


async def test_connection_over_the_limit_is_closed() -> None:
    async with serving(most=2) as connect:
        held = [await connect() for _ in range(2)]
        third, _ = await connect()
        async with asyncio.timeout(DEADLINE_S / 2):
            assert await ended(third)
        held[0][1].write(ASK)
        assert await held[0][0].readexactly(15) == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n"], ids=["none", "half", "no end"])
async def test_connection_is_closed_if_no_request_arrives(sent: bytes) -> None:
    async with serving(most=2) as connect:
        reader, writer = await connect()
        writer.write(sent)
        assert await ended(reader)


async def test_connection_is_closed_if_headers_trickle_in() -> None:
    async with serving(most=2) as connect:
        reader, writer = await connect()
        closed = asyncio.create_task(ended(reader))
        for byte in b"GET / HTTP/1.1\r\nhost: a-long-name":
            if closed.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(DEADLINE_S / 10)
        assert await closed


async def test_requests_that_run_longer_than_the_header_deadline_are_still_answered() -> None:
    async with serving(most=2) as connect:
        reader, writer = await connect()
        for _ in range(2):
            writer.write(ASK)
            answer = await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(2)
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert answer.endswith(b"ok")


async def test_connection_is_closed_if_a_second_request_stays_incomplete() -> None:
    async with serving(most=2) as connect:
        reader, writer = await connect()
        writer.write(ASK)
        await reader.readuntil(b"ok")
        writer.write(b"GET / HT")
        assert await ended(reader)


@pytest.mark.parametrize("app", [large_app, cutting_app], ids=["left alone", "cut off"])
async def test_client_that_reads_nothing_is_disconnected(app: Any) -> None:
    async with serving(most=1, app=app) as connect:
        _, writer = await connect()
        writer.write(ASK)
        await asyncio.sleep(1 + 4 * DEADLINE_S)  # uvicorn closes idle connections, and waits for the client to read
        other, asking = await connect()  # one place is free
        asking.write(ASK)
        assert await other.readexactly(15) == b"HTTP/1.1 200 OK"


def test_connection_limit_is_at_most_half_the_file_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        room = raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        assert 1 <= room <= max(1, hard // 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", [b"x: " + b"y" * 1000, b"x-%d: y"], ids=["long", "many"])
async def test_connection_is_closed_if_headers_never_end(name: bytes) -> None:
    """The connection is also closed if an earlier request is still being answered."""
    async with serving(most=2, deadline_s=30) as connect:
        for begun in (b"", ASK):
            reader, writer = await connect()
            writer.write(begun + b"GET / HTTP/1.1\r\nhost: x\r\n")
            sent = 0
            with suppress(ConnectionError):
                while sent < 8 * MAX_HEAD_BYTES:
                    line = name.replace(b"%d", b"%d" % sent) + b"\r\n"
                    writer.write(line)
                    sent += len(line)
                    await writer.drain()
            assert await cut(reader)
        other, asking = await connect()
        asking.write(ASK)
        assert await other.readexactly(15) == b"HTTP/1.1 200 OK"


CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("begun", [b"GET / HTTP/1.1\r\n", CHUNKED + b"0\r\n"], ids=["headers", "trailers"])
async def test_oversized_headers_return_400(begun: bytes) -> None:
    async with serving(most=2, deadline_s=30) as connect:
        reader, writer = await connect()
        writer.write(begun + b"x: ")
        for _ in range(2):  # bytes beyond the limit in the same read do not count
            await asyncio.sleep(0.05)
            writer.write(b"y" * MAX_HEAD_BYTES)
        assert await reader.readexactly(12) == b"HTTP/1.1 400"


async def cut(reader: asyncio.StreamReader) -> bool:
    """Return whether the connection ended, whatever the server sent before."""
    with suppress(ConnectionResetError):
        async with asyncio.timeout(10 * DEADLINE_S):
            await reader.read()
    return True


async def test_large_body_does_not_count_towards_the_header_limit() -> None:
    async with serving(most=2, app=large_body_app) as connect:
        reader, writer = await connect()
        size = 16 * MAX_HEAD_BYTES
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(16):
            writer.write(b"x" * MAX_HEAD_BYTES)
            await writer.drain()
        assert await reader.readexactly(15) == b"HTTP/1.1 401 Un"


async def large_body_app(scope: Any, receive: Any, send: Any) -> None:
    """An application that responds before reading any of the request."""
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


async def test_client_that_pipelines_requests_endlessly_is_disconnected() -> None:
    async with serving(most=2) as connect:
        reader, writer = await connect()
        with suppress(ConnectionError):
            for _ in range(50):
                writer.write(ASK * 100)
                await writer.drain()
        assert await ended(reader) or reader.at_eof()


async def test_pipelined_requests_are_answered() -> None:
    async with serving(most=2) as connect:
        reader, writer = await connect()
        writer.write(ASK * MAX_WAITING)
        for _ in range(3):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
            assert await reader.readexactly(2) == b"ok"


async def test_client_that_does_not_read_its_response_is_disconnected() -> None:
    lost = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        connection_of(scope).lost.listen(lost.set)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2):
            await send({"type": "http.response.body", "body": b"x" * LARGE, "more_body": True})

    async with serving(most=2, app=app) as connect:
        _, writer = await connect()
        cast(asyncio.Transport, writer.transport).pause_reading()
        writer.write(ASK)
        async with asyncio.timeout(20 * DEADLINE_S):
            await lost.wait()


async def test_closed_connection_is_freed_without_garbage_collection() -> None:
    def protocols() -> int:
        return sum(type(thing) is ClientProtocol for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = protocols()
        async with serving(most=2) as connect:
            reader, writer = await connect()
            writer.write(ASK)
            await reader.readuntil(b"ok")
            assert protocols() == before + 1
            writer.close()
            await asyncio.sleep(DEADLINE_S)
            assert protocols() == before
    finally:
        gc.enable()
