"""Tests that a stopping server loses no connection and no request that is being sent."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, cast

import pytest

from serving.http import connections
from serving.http.connections import Connection as ServedConnection
from serving.server import http_server as http_server_module
from serving.server.acceptor import Acceptor
from serving.server.address_limit import AddressLimit
from serving.server.http_server import HttpServer

LAST_REQUEST_S = 0.4
ASK = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def ending() -> AsyncIterator[tuple[HttpServer, Connection]]:
    """Run a server with one connection. It has stopped when the context exits."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = HttpServer(app, most=8)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        while not server.server_state.connections:
            await asyncio.sleep(0.01)
        yield server, (reader, writer)
        server.stop()
        writer.close()
        await task


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LAST_REQUEST_S", LAST_REQUEST_S)


async def told_to_end(server: HttpServer) -> None:
    """Wait until the server has notified its connections that it is stopping."""
    server.stop()
    await asyncio.sleep(0.05)


async def answer(connection: Connection) -> bytes:
    reader, writer = connection
    writer.write(ASK)
    async with asyncio.timeout(3):
        return await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(2)


@pytest.mark.parametrize("asked_before", [False, True], ids=["new", "kept"])
async def test_server_that_is_stopping_answers_one_last_request_on_an_open_connection(
    asked_before: bool,
) -> None:
    async with ending() as (server, connection):
        if asked_before:
            await answer(connection)
        await told_to_end(server)
        last = await answer(connection)
        assert last.startswith(b"HTTP/1.1 200 OK")
        assert b"connection: close" in last.lower()
        assert await connection[0].read() == b""


@pytest.mark.slow
async def test_idle_connection_is_closed_promptly_when_the_server_stops() -> None:
    async with ending() as (server, (reader, _)):
        await told_to_end(server)
        async with asyncio.timeout(2 * LAST_REQUEST_S):
            assert await reader.read() == b""


async def test_server_stops_without_waiting_for_the_next_date_header_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server_module, "_DATE_S", 60.0)
    async with asyncio.timeout(10), ending():
        pass


@pytest.mark.slow
async def test_responses_have_the_current_date() -> None:
    async with ending() as (_, connection):
        first = await answer(connection)
        await asyncio.sleep(1.2)
        assert _date(await answer(connection)) > _date(first)


async def test_every_accepted_connection_has_a_protocol_handler_when_the_server_stops() -> None:
    for ticks in range(6):
        await stop_after_a_connection(ticks)


async def stop_after_a_connection(ticks: int) -> None:
    made = []

    class Noting(asyncio.Protocol):
        def __init__(self) -> None:
            self.connection = ServedConnection()

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(transport)

    with socket.socket() as listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        acceptor = Acceptor(
            listener,
            cast(Any, Noting),
            most=8,
            address_limit=AddressLimit(8),
            context=None,
            handshake_s=1,
        )
        acceptor.start()
        await asyncio.sleep(0)
        client.connect(listener.getsockname())
        for _ in range(ticks):
            await asyncio.sleep(0)
        await acceptor.stop(1.0)
        if not made:
            listener.accept()[0].close()  # raises if none waits
        for transport in made:
            transport.close()
        await asyncio.sleep(0)


def _date(head: bytes) -> datetime:
    (line,) = [line for line in head.split(b"\r\n") if line.startswith(b"date: ")]
    return parsedate_to_datetime(line.removeprefix(b"date: ").decode("ascii"))
