"""Tests health checks over a connection that stays open."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from svc.engine.client import EngineClient, Health, engine_http
from svc.engine.vllm.health_checks import HealthChecks

# As uvicorn, on which vLLM runs, answers a request for `/health`.
ANSWER = b"HTTP/1.1 200 OK\r\ndate: Tue, 01 Dec 2026 06:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: 0\r\n\r\n"
DEAD = ANSWER.replace(b"200 OK", b"503 Service Unavailable")


class Server:
    """Answers every request on its connections with `answer`, and counts the connections."""

    def __init__(self) -> None:
        self.answer = ANSWER
        self.connections: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        self.connections.append(writer)
        while await reader.read(1000):
            writer.write(self.answer)
        writer.close()


@pytest.fixture
def socket() -> Iterator[Path]:
    with TemporaryDirectory(prefix="svc") as folder:
        yield Path(folder) / "socket"


@asynccontextmanager
async def serving(socket: Path) -> AsyncIterator[Server]:
    server = Server()
    listener = await asyncio.start_unix_server(server.serve, socket)
    try:
        yield server
    finally:
        listener.close()
        for connection in server.connections:
            connection.transport.abort()


def client_of(socket: Path) -> EngineClient:
    return EngineClient(engine_http(socket), "tuned", checks=HealthChecks(socket))


async def test_health_checks_share_one_connection(socket: Path) -> None:
    async with serving(socket) as server, client_of(socket) as client:
        assert [await client.health() for _ in range(3)] == [Health.GOOD] * 3
        server.answer = DEAD
        assert await client.health() is Health.DEAD
        assert len(server.connections) == 1


async def test_health_check_is_retried_if_the_engine_has_closed_the_connection(socket: Path) -> None:
    async with serving(socket) as server, client_of(socket) as client:
        assert await client.healthy()
        server.connections[0].close()
        assert await client.healthy()
        assert len(server.connections) == 2


@pytest.mark.parametrize("end", [lambda socket: None, Path.unlink], ids=["refused", "missing"])
async def test_engine_is_reported_dead_when_its_socket_is_gone_or_refuses_connections(
    socket: Path, end: Callable[[Path], None]
) -> None:
    async with client_of(socket) as client:
        async with serving(socket):
            assert await client.healthy()
        end(socket)
        assert await client.health() is Health.DEAD
