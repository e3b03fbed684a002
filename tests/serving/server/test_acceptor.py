"""Tests that a single address may hold only a share of all connections, so that others can connect."""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from serving.server import acceptor
from serving.server.http_server import HttpServer
from serving.server.tls import Certificate
from serving.server.warning_limit import WarningLimit
from tests.serving.certificates import make_certificate

pytestmark = pytest.mark.slow

ONE, OTHER = "127.0.0.1", "127.0.0.2"
SHARE = 2
ASK = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Clients:
    """Clients of one server that connect from several addresses."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._writers: list[asyncio.StreamWriter] = []

    async def connect(self, source: str = ONE, context: ssl.SSLContext | None = None) -> Client:
        """Open a new connection."""
        if self._listener.family == socket.AF_UNIX:
            reader, writer = await asyncio.open_unix_connection(self._listener.getsockname())
        else:
            port = self._listener.getsockname()[1]
            reader, writer = await asyncio.open_connection(ONE, port, local_addr=(source, 0), ssl=context)
        self._writers.append(writer)
        return reader, writer

    async def close(self) -> None:
        """Close all client connections."""
        for writer in self._writers:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving(address: Any = (ONE, 0), **options: Any) -> AsyncIterator[Clients]:
    """Run a server that accepts eight connections, two of them from the same address."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as listener:
        listener.bind(address)
        server = HttpServer(app, 8, **{"most_per_address": SHARE} | options)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        clients = Clients(listener)
        try:
            yield clients
        finally:
            await clients.close()
            server.stop()
            await task


async def answered(client: Client) -> bool:
    """Return whether a request gets a response, or False if the server closes the connection."""
    reader, writer = client
    async with asyncio.timeout(3):
        try:
            writer.write(ASK)
            return (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        except (ConnectionError, asyncio.IncompleteReadError):
            return False


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(3):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_new_connection_is_closed_if_its_address_has_reached_the_connection_limit() -> None:
    async with serving() as clients:
        held = [await clients.connect() for _ in range(SHARE)]
        assert not await answered(await clients.connect())
        assert await answered(await clients.connect(OTHER))
        assert [await answered(client) for client in held] == [True] * SHARE


async def test_address_can_connect_again_after_one_of_its_connections_closes() -> None:
    async with serving() as clients:
        (_, first), *_ = [await clients.connect() for _ in range(SHARE)]
        assert not await answered(await clients.connect())
        first.close()

        async def let_in() -> bool:
            return await answered(await clients.connect())

        await until(let_in)
        assert not await answered(await clients.connect())  # only one was free again


async def test_connections_from_a_trusted_proxy_are_unlimited() -> None:
    async with serving(proxies=["127.0.0.2/32"]) as clients:
        for _ in range(3 * SHARE):
            assert await answered(await clients.connect(OTHER))
        held = [await answered(await clients.connect()) for _ in range(SHARE)]
        assert held == [True] * SHARE


async def test_connections_through_a_unix_socket_are_unlimited(socket_folder: Path) -> None:
    async with serving(str(socket_folder / "http.sock")) as clients:
        for _ in range(3 * SHARE):
            assert await answered(await clients.connect())


async def test_connection_without_a_tls_handshake_counts_towards_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.server.http_server.REQUEST_DEADLINE_S", 0.5)
    files = make_certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=str(files[0]))
    trusting.check_hostname = False

    async with serving(certificate=Certificate(*files)) as clients:
        silent = [await clients.connect() for _ in range(SHARE)]
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await clients.connect(context=trusting)
        assert await answered(await clients.connect(OTHER, trusting))
        for reader, _ in silent:  # until their handshakes time out
            with suppress(ConnectionError):
                await reader.read()
        assert [await answered(await clients.connect(ONE, trusting)) for _ in range(SHARE)] == [True] * SHARE
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await clients.connect(context=trusting)


async def test_address_is_logged_only_once_despite_many_closed_connections(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        acceptor.log, "filters", [WarningLimit()]
    )  # another test may have used up this minute's warning
    async with serving() as clients:
        for _ in range(SHARE + 3):
            await clients.connect()
        assert not await answered(await clients.connect())
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ONE in warning
    assert "serve.max_connections_per_address" in warning
