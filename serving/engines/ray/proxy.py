"""Passes bytes between TLS connections and an engine's Unix socket, without inspecting them.

When one side closes its connection, the other side's connection is closed too, so that an engine stops working on an
answer whose client has disconnected.
"""

import asyncio
from pathlib import Path
from typing import cast

from svc.engine.address import connect_to_socket


class _Side(asyncio.Protocol):
    """One of the two connections between which the proxy passes bytes."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.other and self.other.transport:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other and self.other.transport and not self.other.transport.is_closing():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other and self.other.transport and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other and self.other.transport:
            if exc is None:
                self.other.transport.close()  # sends the rest of an answer first
            else:
                self.other.transport.abort()


class Front(_Side):
    """An incoming connection from the server, for which a separate connection to the engine is opened.

    Args:
        socket: the engine's Unix socket.
    """

    def __init__(self, socket: Path) -> None:
        super().__init__()
        self._socket = str(socket)
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None  # noqa: S101 - just set
        self.transport.pause_reading()
        self._connecting = asyncio.create_task(self._connect())

    def connection_lost(self, exc: Exception | None) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        super().connection_lost(exc)

    async def _connect(self) -> None:
        assert self.transport is not None  # noqa: S101 - called once connected
        back = _Side()
        back.other = self
        try:
            connected = await connect_to_socket(self._socket)
            try:
                await asyncio.get_running_loop().create_unix_connection(lambda: back, sock=connected)
            except BaseException:
                connected.close()
                raise
        except OSError:
            self.transport.abort()
            return
        self.other = back
        if self.transport.is_closing():
            back.transport.abort() if back.transport else None
        else:
            self.transport.resume_reading()
