"""Clients' requests to one engine, over connections that are kept: most requests need no new one.

What the server asks the engine itself goes over others (svc.engine.client), so that a reload never queues behind
streams. Our own, because the cheapest library takes three times as long for a request, and does not tell whether an
engine can have seen one that failed: docs/engine.md has the figures.
"""

import asyncio
import socket as sockets
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Self

from svc.engine.vllm.connection import (
    BrokenConnectionError,
    EngineConnection,
    MalformedAnswerError,
    UnreachableError,
)

_CONNECT_TIMEOUT_S = 5.0
"""A local socket answers at once, or its engine has hundreds of connections to take first."""
_CONNECT_PAUSE_S = 0.005
_IDLE_S = 3.0
"""vLLM closes a connection that was idle for 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE)."""
_MOST_WHOLE_BYTES = 64 * 2**20
_EVENT_STREAM = "text/event-stream"


class EngineConnections:
    """As many connections as requests at once: how many may run is for the gateway to say.

    Args:
        socket: the engine's unix socket.
        silence_s: longest wait for the next bytes of an answer, seconds.
        connect_timeout_s: longest wait for a connection, seconds.
        idle_s: how long a connection is kept without a request, seconds; less than the engine keeps it.

    Attributes:
        is_closed: it takes no requests any more.
    """

    def __init__(
        self,
        socket: Path,
        *,
        silence_s: float,
        connect_timeout_s: float = _CONNECT_TIMEOUT_S,
        idle_s: float = _IDLE_S,
    ) -> None:
        self._socket = str(socket)
        self._silence_s = silence_s
        self._connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._open: set[EngineConnection] = set()
        self._idle: list[EngineConnection] = []  # the one that was used last is the last
        self._sweeping: asyncio.TimerHandle | None = None
        self.is_closed = False

    def post(self, path: str, payload: bytes, request_id: str, header_lines: str = "") -> "EngineAnswer":
        """A request with JSON, sent when its `async with` is entered.

        Args:
            header_lines: further ones of its head, each with its end.
        """
        head = (
            f"POST {path} HTTP/1.1\r\nhost: engine\r\naccept-encoding: identity\r\ncontent-type: application/json\r\n"
            f"x-request-id: {request_id}\r\n{header_lines}content-length: {len(payload)}\r\n\r\n"
        )
        return EngineAnswer(self, head.encode("latin-1") + payload)

    def get(self, path: str) -> "EngineAnswer":
        """A request without a body, likewise."""
        return EngineAnswer(self, f"GET {path} HTTP/1.1\r\nhost: engine\r\naccept-encoding: identity\r\n\r\n".encode())

    def close(self) -> None:
        """Closes all connections, those whose answers are under way among them."""
        self.is_closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        self._idle.clear()
        for connection in self._open.copy():
            connection.close()

    def take(self) -> EngineConnection | None:
        """A connection that is kept: the one that was used last, so that others become old and are closed."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed:
                if connection.idle_since > self._oldest:
                    return connection
                connection.close()
        return None

    async def connect(self) -> EngineConnection:
        """A new connection.

        Raises:
            UnreachableError: there is none.
        """
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                connected = await _connected(self._socket)
                try:
                    loop = asyncio.get_running_loop()
                    _, connection = await loop.create_unix_connection(self._made, sock=connected)
                except BaseException:
                    connected.close()
                    raise
        except OSError as error:  # which a TimeoutError is too
            raise UnreachableError(f"the engine takes no connection: {error!r}") from error
        if self.is_closed:
            connection.close()
            raise UnreachableError("the connections to this engine were closed")
        return connection

    def give_back(self, connection: EngineConnection) -> None:
        """Keeps a connection whose answer is complete; closes another."""
        if connection.release():
            self._idle.append(connection)
            if self._sweeping is None:
                self._sweeping = asyncio.get_running_loop().call_later(self._idle_s, self._sweep)

    def _made(self) -> EngineConnection:
        return EngineConnection(self._silence_s, self._open)

    @property
    def _oldest(self) -> float:
        """When a connection was last used that is kept no longer."""
        return asyncio.get_running_loop().time() - self._idle_s

    def _sweep(self) -> None:
        """Closes those that were kept for too long; one timer for all."""
        self._sweeping, oldest = None, self._oldest
        kept = [connection for connection in self._idle if connection.idle_since > oldest]
        for connection in self._idle[: len(self._idle) - len(kept)]:
            connection.close()
        self._idle = [connection for connection in kept if not connection.is_closed]
        if self._idle:
            at = self._idle[0].idle_since + self._idle_s
            self._sweeping = asyncio.get_running_loop().call_at(at, self._sweep)


class EngineAnswer:
    """One request and its answer, within an `async with`. Leaving it early ends the engine's work.

    Where a kept connection breaks before a byte of the answer came, the request is sent once more, on a new one: the
    engine may have closed it just then.

    Entering raises:
        UnreachableError: nothing was sent.
        BrokenConnectionError, SilenceError: no answer began.
    """

    def __init__(self, pool: EngineConnections, request: bytes) -> None:
        self._pool = pool
        self._request = request
        self._connection: EngineConnection  # only within the `async with`: afterwards it is another request's

    async def __aenter__(self) -> Self:
        kept = self._pool.take()
        if kept is None:
            self._connection = await self._asked_anew()
            return self
        try:
            await kept.ask(self._request)
            self._connection = kept
        except BrokenConnectionError as broken:
            if kept.answered or self._pool.is_closed:
                raise
            self._connection = await self._asked_again(broken)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """What leaving the `async with` does."""
        connection = self._connection
        del self._connection
        self._pool.give_back(connection)

    async def _asked_anew(self) -> EngineConnection:
        connection = await self._pool.connect()
        await connection.ask(self._request)
        return connection

    async def _asked_again(self, broken: BrokenConnectionError) -> EngineConnection:
        try:
            return await self._asked_anew()
        except UnreachableError:
            # A socket that was closed over a request that nobody had read is reset; without that, the engine may have
            # died of the request, and no other shall get it.
            if isinstance(broken.__cause__, ConnectionError):
                raise
            raise broken from None

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self._connection.status

    @property
    def content_type(self) -> str:
        """As the engine says it; empty where it does not."""
        return self._connection.content_type

    @property
    def arrived(self) -> float:
        """When the last `read_some` came from the engine, seconds; see EngineConnection."""
        return self._connection.arrived

    @property
    def is_event_stream(self) -> bool:
        """The body is server-sent events."""
        return self._connection.content_type.startswith(_EVENT_STREAM)

    def read_some(self) -> Coroutine[object, object, bytes]:
        """Return the next bytes of the body that came together, as soon as there are some; nothing at its end.

        They are at most about 64 KiB.

        Raises:
            BrokenConnectionError, SilenceError: the rest will not come.
        """
        return self._connection.read_some()

    async def read(self) -> bytes:
        """The rest of the body; raises as `read_some`."""
        parts, size = list[bytes](), 0
        while part := await self._connection.read_some():
            parts.append(part)
            size += len(part)
            if size > _MOST_WHOLE_BYTES:
                raise MalformedAnswerError(f"the engine's answer has over {_MOST_WHOLE_BYTES} bytes")
        return b"".join(parts)


async def _connected(path: str) -> sockets.socket:
    """A connected socket; waits while more connections wait for the engine than its backlog has room for.

    Not asyncio's `sock_connect`, which takes a socket for connected that the kernel refused for that.

    Raises:
        OSError: nobody listens.
    """
    connecting = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        while True:
            try:
                connecting.connect(path)
            except BlockingIOError:
                await asyncio.sleep(_CONNECT_PAUSE_S)
            else:
                return connecting
    except BaseException:
        connecting.close()
        raise
