"""A server on a unix socket that reads requests and says the bytes that it is told to: for answers that are none."""

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
    """As a part of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def say(*parts: bytes, then_hang_up: bool = False) -> Reply:
    """A reply of these bytes, each part for itself."""

    async def reply(peer: Peer) -> None:
        for part in parts:
            await peer.say(part)
            await asyncio.sleep(0)
        if then_hang_up:
            peer.hang_up()

    return reply


async def silence(peer: "Peer") -> None:
    """A reply of nothing."""


class Peer(asyncio.Protocol):
    """One connection.

    Attributes:
        asked: the request that it came with last.
        closed: its client has closed it, or it was hung up.
        said: how many bytes it was given to send.
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
        """Sends bytes, and returns when the client's socket has room for more."""
        self._transport.write(data)
        self.said += len(data)
        await self._room.wait()

    def hang_up(self) -> None:
        """Closes the connection."""
        self._transport.close()

    def stop_reading(self) -> None:
        """Leaves what comes from now on unread."""
        self._transport.pause_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins."""
        self._transport = cast(asyncio.Transport, transport)
        self._server.peers.append(self)

    def data_received(self, data: bytes) -> None:
        """Replies once a request is complete."""
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        lengths = [line for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
        if blank and len(body) >= (int(lengths[0].split(b":")[1]) if lengths else 0):
            self.asked, self._received = self._received, b""
            self._server.requests.append(self.asked)
            self._replying = asyncio.ensure_future(self._server.reply()(self))

    def pause_writing(self) -> None:
        """The client reads no more."""
        self._room.clear()

    def resume_writing(self) -> None:
        """It does."""
        self._room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends."""
        self.closed.set()
        if self._replying is not None:
            self._replying.cancel()


class RawServer:
    """Answers each request with a reply of its own; the last of them stays.

    Attributes:
        requests: as they came.
        peers: the connections that there were.
    """

    def __init__(self, *replies: Reply) -> None:
        self._replies = list(replies)
        self.requests: list[bytes] = []
        self.peers: list[Peer] = []
        self._server: asyncio.Server

    def reply(self) -> Reply:
        """The next."""
        return self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]

    @property
    def open(self) -> int:
        """How many connections are open."""
        return sum(not peer.closed.is_set() for peer in self.peers)

    async def start(self, socket: Path) -> None:
        """Listens."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: Peer(self), str(socket), backlog=2048)

    def stop_listening(self) -> None:
        """Takes no connection any more."""
        self._server.close()

    async def stop(self) -> None:
        """Ends it, and what runs in it."""
        self._server.close()
        for peer in self.peers:
            peer.hang_up()
        await asyncio.sleep(0)


@asynccontextmanager
async def raw_server(socket: Path, *replies: Reply) -> AsyncIterator[RawServer]:
    """A server for the body."""
    server = RawServer(*replies)
    await server.start(socket)
    try:
        yield server
    finally:
        await server.stop()
