"""Runs an ASGI application behind a real Unix socket in the test's event loop, and kills it on request."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

_ACCEPT_TICKS = 3
"""Event-loop turns until uvicorn knows an accepted connection. asyncio's server must not be closed earlier,
because a connection that arrives too late would stay open forever."""


class SocketServer:
    """A uvicorn server that stops with its test.

    Args:
        protocol: protocol for its connections, or None for uvicorn's own.
    """

    def __init__(self, app: ASGIApp, socket: Path, protocol: type[asyncio.Protocol] | None = None) -> None:
        self.socket = socket
        config = uvicorn.Config(
            app, uds=str(socket), log_level="critical", lifespan="off", http=protocol or AutoHTTPProtocol
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._server.lifespan = config.lifespan_class(config)
        self._ending: Future[None] | None = None

    async def start(self) -> None:
        """Start until the socket accepts connections, without uvicorn's main loop, whose ticks make stops slow."""
        self._loop = asyncio.get_running_loop()
        starting = asyncio.ensure_future(self._server.startup())
        try:
            await asyncio.shield(starting)
        finally:
            await starting  # cancelled in the middle, it would leave an open socket

    def kill(self) -> None:
        """Stop as after SIGKILL, from any thread: close every connection, so that the socket no longer responds."""
        if self._ending:
            return
        for listener in self._server.servers:
            for listening in listener.sockets:
                self._loop.remove_reader(listening)
        self._cut_connections()
        self._ending = asyncio.run_coroutine_threadsafe(self._close(), self._loop)

    def _cut_connections(self) -> None:
        for connection in list(self._server.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport:
                transport.abort()

    async def _close(self) -> None:
        for _ in range(_ACCEPT_TICKS):
            await asyncio.sleep(0)
        for listener in self._server.servers:
            listener.close()
        self._cut_connections()

    async def stop(self) -> None:
        """Stop the server together with all running requests."""
        self.kill()
        if self._ending:
            # Shielded: if one of two waiting tasks is cancelled, it must not cancel the stop for the other.
            await asyncio.shield(asyncio.wrap_future(self._ending))
        tasks = list(self._server.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def running(
    app: ASGIApp, socket: Path, protocol: type[asyncio.Protocol] | None = None
) -> AsyncIterator[SocketServer]:
    """Run the application on a socket while the context is active. See `SocketServer`."""
    server = SocketServer(app, socket, protocol)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextmanager
def running_in_thread(app: ASGIApp, socket: Path) -> Iterator[None]:
    """Run the application on a socket from a thread, for a test without an event loop of its own."""
    loop, listening, ending = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def run() -> None:
        async with running(app, socket):
            listening.set()
            await ending.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert listening.wait(timeout=10)
        yield
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join()
        loop.close()
