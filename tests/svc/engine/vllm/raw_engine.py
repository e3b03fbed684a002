"""Connections to a server that sends the given bytes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from svc.engine.vllm import connection_pool
from svc.engine.vllm.connection_pool import EngineConnections
from tests.svc.engine.raw_server import RawServer, Reply, raw_server


@asynccontextmanager
async def engine(
    socket: Path, *replies: Reply, silence_s: float = 10.0, idle_s: float = 10.0
) -> AsyncIterator[tuple[EngineConnections, RawServer]]:
    """Run a server with these replies and yield connections to it."""
    async with raw_server(socket, *replies) as server:
        with pytest.MonkeyPatch.context() as patch, closing(EngineConnections(socket, silence_s=silence_s)) as pool:
            patch.setattr(connection_pool, "_IDLE_S", idle_s)
            yield pool, server


async def ask(pool: EngineConnections, payload: bytes = b"{}") -> bytes:
    """Send a request and return the response body."""
    async with pool.post("/v1/completions", payload, "req-1") as answer:
        return await answer.read()


async def until_closed(server: RawServer) -> None:
    """Return once the server has no open connections."""
    async with asyncio.timeout(5):
        for peer in server.peers:
            await peer.closed.wait()
