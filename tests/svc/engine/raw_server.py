"""A server on a Unix socket that reads requests and sends the given bytes, including invalid responses."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
Reply = Callable[["Peer"], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    """Return data encoded as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def say(*parts: bytes, then_hang_up: bool = False) -> Reply:
    """Return a reply that sends these byte strings one by one."""

    async def reply(peer: Peer) -> None:
        for part in parts:
            await peer.say(part)
            await asyncio.sleep(0)
        if then_hang_up:
            peer.hang_up()

    return reply


async def silence(peer: "Peer") -> None:
    """Send nothing in reply."""


class Peer(asyncio.Protocol):
    """One client connection.

    Attributes:
        asked: the last request received.
        closed: whether the connection has been closed by the client or by the server.
        said: number of bytes it was given to send.
    """

    def __init__(self, server: "RawServer") -> None:
        self._server = server
        self.asked = self._received = b""
        self._room = asyncio.Event()
        self._room.set()
        self._transport: asyncio.Transport
        self._replying: asyncio.Task[None] | None = None
        self.closed = asyncio.Event()
        self.said = 0

    async def say(self, data: bytes) -> None:
        """Send bytes and return once the client's socket can accept more."""
        self._transport.write(data)
        self.said += len(data)
        await self._room.wait()

    def hang_up(self) -> None:
        """Close the connection."""
        self._transport.close()

    def stop_reading(self) -> None:
        """Stop reading incoming data."""
        self._transport.pause_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register the connection."""
        self._transport = cast(asyncio.Transport, transport)
        self._server.peers.append(self)

    def data_received(self, data: bytes) -> None:
        """Reply when a request is complete."""
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        lengths = [line for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
        if blank and len(body) >= (int(lengths[0].split(b":")[1]) if lengths else 0):
            self.asked, self._received = self._received, b""
            self._server.requests.append(self.asked)
            self._replying = asyncio.ensure_future(self._server.reply()(self))

    def pause_writing(self) -> None:
        """Record that the client is not reading."""
        self._room.clear()

    def resume_writing(self) -> None:
        """Record that the client is reading again."""
        self._room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Record that the connection has ended."""
        self.closed.set()
        if self._replying is not None:
            self._replying.cancel()


class RawServer:
    """A server that answers each request with the next reply, and any further requests with the last one.

    Attributes:
        requests: raw requests as they were received.
        peers: all connections so far.
    """

    def __init__(self, *replies: Reply) -> None:
        self._replies = list(replies)
        self.requests: list[bytes] = []
        self.peers: list[Peer] = []
        self._server: asyncio.Server

    def reply(self) -> Reply:
        """Return the next reply to send."""
        return self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]

    @property
    def open(self) -> int:
        """Return the number of open connections."""
        return sum(not peer.closed.is_set() for peer in self.peers)

    async def start(self, socket: Path) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: Peer(self), str(socket), backlog=2048)

    def stop_listening(self) -> None:
        """Stop accepting new connections."""
        self._server.close()

    async def stop(self) -> None:
        """Stop the server and any replies in progress."""
        self._server.close()
        for peer in self.peers:
            peer.hang_up()
        await asyncio.sleep(0)


@asynccontextmanager
async def raw_server(socket: Path, *replies: Reply) -> AsyncIterator[RawServer]:
    """Run a server while the context is active."""
    server = RawServer(*replies)
    await server.start(socket)
    try:
        yield server
    finally:
        await server.stop()
