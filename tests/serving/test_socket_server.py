"""Tests that an engine double's server leaves no connection open, whenever it is stopped."""

import asyncio
import gc
import socket
import warnings
from pathlib import Path

import pytest
from starlette.responses import Response

from tests.serving.socket_server import SocketServer


@pytest.mark.filterwarnings("default::ResourceWarning")
def test_connection_arriving_during_shutdown_is_closed(socket_folder: Path) -> None:
    async def end_while_a_client_connects(ticks: int) -> None:
        server = SocketServer(Response(), socket_folder / "engine.sock")
        await server.start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(socket_folder / "engine.sock"))
            for _ in range(ticks):
                await asyncio.sleep(0)
            await server.stop()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for ticks in range(6):
            asyncio.run(end_while_a_client_connects(ticks))
        gc.collect()
    assert not [str(warning.message) for warning in caught if issubclass(warning.category, ResourceWarning)]
