"""Runs an ASGI application behind a real unix socket, in the loop of the test, and kills it when asked."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp


class SocketServer:
    """A uvicorn server that ends with its test."""

    def __init__(self, app: ASGIApp, socket: Path) -> None:
        self.socket = socket
        config = uvicorn.Config(app, uds=str(socket), log_level="critical", lifespan="off")
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)

    async def start(self) -> None:
        """Returns when the socket takes connections. Without uvicorn's main loop, whose ticks make every end slow."""
        starting = asyncio.ensure_future(self._server.startup())
        try:
            await asyncio.shield(starting)
        finally:
            await starting  # cut off in the middle, it would leave a socket that nobody closes

    def kill(self) -> None:
        """Ends it as SIGKILL would: every connection is cut, and the socket answers no more."""
        for listener in self._server.servers:
            listener.close()
        for connection in list(self._server.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport:
                transport.abort()

    async def stop(self) -> None:
        """Ends it, and with it what still runs."""
        self.kill()
        tasks = list(self._server.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def running(app: ASGIApp, socket: Path) -> AsyncIterator[SocketServer]:
    """The application on a socket for the body of the `with`."""
    server = SocketServer(app, socket)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
