"""Sends clients' requests to an engine over pooled connections.

The server's own requests use separate connections (svc.engine.client), so that a reload never waits behind streams. No
HTTP library is used, because even the fastest takes three times as long per request (docs/engine.md) and does not
report whether the engine may have received a request that failed.
"""

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Self

from svc.engine.address import EngineAddress, TlsAddress, connect_to_socket
from svc.engine.vllm.connection import (
    BrokenConnectionError,
    EngineConnection,
    MalformedAnswerError,
    UnreachableError,
)

_CONNECT_TIMEOUT_S = 5.0
"""Maximum time to wait for a connection, in seconds. A local socket connects immediately, unless hundreds of
connections are waiting for the engine to accept them."""
_IDLE_S = 3.0
"""Time after which an idle connection is closed, in seconds. It must be shorter than the 5 seconds after which
vLLM closes an idle connection (VLLM_HTTP_TIMEOUT_KEEP_ALIVE)."""
_MAX_BODY_BYTES = 64 * 2**20
_EVENT_STREAM = "text/event-stream"


class EngineConnections:
    """A pool of connections to an engine. It opens one connection per concurrent request. The gateway limits the number
    of concurrent requests.

    Args:
        address: the engine's Unix socket, or its port on another machine.
        silence_s: maximum time to wait for the next bytes of a response, in seconds.

    Attributes:
        is_closed: whether the pool has been closed and accepts no more requests.
    """

    def __init__(self, address: EngineAddress, *, silence_s: float) -> None:
        self._address = address
        self._silence_s = silence_s
        self._open: set[EngineConnection] = set()
        self._idle: list[EngineConnection] = []  # the most recently used is the last
        self._sweeping: asyncio.TimerHandle | None = None
        self.is_closed = False

    def post(self, path: str, payload: bytes, request_id: str, header_lines: str = "") -> "EngineAnswer":
        """Create a POST request with a JSON body. It is sent when its `async with` block is entered.

        Args:
            header_lines: additional header lines, each including its line ending.
        """
        head = (
            f"POST {path} HTTP/1.1\r\nhost: engine\r\naccept-encoding: identity\r\ncontent-type: application/json\r\n"
            f"x-request-id: {request_id}\r\n{header_lines}content-length: {len(payload)}\r\n\r\n"
        )
        return EngineAnswer(self, head.encode("latin-1") + payload)

    def get(self, path: str) -> "EngineAnswer":
        """Create a GET request. It is sent when its `async with` block is entered."""
        return EngineAnswer(self, f"GET {path} HTTP/1.1\r\nhost: engine\r\naccept-encoding: identity\r\n\r\n".encode())

    def close(self) -> None:
        """Close all connections, including those in use."""
        self.is_closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        self._idle.clear()
        for connection in self._open.copy():
            connection.close()

    def take(self) -> EngineConnection | None:
        """Return the most recently used idle connection, or None if none is idle.

        The connections that have been idle for longer can then expire.
        """
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed:
                if connection.idle_since > self._oldest:
                    return connection
                connection.close()
        return None

    async def connect(self) -> EngineConnection:
        """Open and return a new connection.

        Raises:
            UnreachableError: the engine does not accept connections.
        """
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                connection = await self._connected(self._address)
        except OSError as error:  # includes TimeoutError
            raise UnreachableError(f"cannot connect to the engine: {error!r}") from error
        if self.is_closed:
            connection.close()
            raise UnreachableError("the connections to this engine were closed")
        return connection

    async def _connected(self, address: EngineAddress) -> EngineConnection:
        loop = asyncio.get_running_loop()

        def new() -> EngineConnection:
            return EngineConnection(self._silence_s, self._open)

        if isinstance(address, TlsAddress):
            # The certificate identifies the engine, not a host name.
            _, connection = await loop.create_connection(
                new, address.host, address.port, ssl=address.context, server_hostname=""
            )
            return connection
        connected = await connect_to_socket(str(address))
        try:
            _, connection = await loop.create_unix_connection(new, sock=connected)
        except BaseException:
            connected.close()
            raise
        return connection

    def give_back(self, connection: EngineConnection) -> None:
        """Return a connection to the pool if its response is complete; otherwise close it."""
        if connection.release():
            self._idle.append(connection)
            if self._sweeping is None:
                self._sweeping = asyncio.get_running_loop().call_later(_IDLE_S, self._sweep)

    @property
    def _oldest(self) -> float:
        """Cutoff time on the event loop's clock. Connections that became idle before this time are closed."""
        return asyncio.get_running_loop().time() - _IDLE_S

    def _sweep(self) -> None:
        """Close connections that have been idle for too long. A single timer serves all connections."""
        self._sweeping, oldest = None, self._oldest
        recent = [connection for connection in self._idle if connection.idle_since > oldest]
        for connection in self._idle[: len(self._idle) - len(recent)]:
            connection.close()
        self._idle = [connection for connection in recent if not connection.is_closed]
        if self._idle:
            at = self._idle[0].idle_since + _IDLE_S
            self._sweeping = asyncio.get_running_loop().call_at(at, self._sweep)


class EngineAnswer:
    """A request to the engine and its response, for use with `async with`.

    Leaving the context early cancels the request in the engine.

    If a pooled connection breaks before the first byte of the response, the request is sent again on a new connection,
    because the engine may have just closed the pooled connection.

    Entering raises:
        UnreachableError: the request was not sent.
        BrokenConnectionError, SilenceError: no response arrived.
    """

    def __init__(self, pool: EngineConnections, request: bytes) -> None:
        self._pool = pool
        self._request = request
        self._connection: EngineConnection  # only within the `async with`: afterwards another request may use it

    async def __aenter__(self) -> Self:
        pooled = self._pool.take()
        if pooled is None:
            self._connection = await self._ask_on_new_connection()
            return self
        try:
            await pooled.ask(self._request)
            self._connection = pooled
        except BrokenConnectionError as broken:
            if pooled.answered or self._pool.is_closed:
                raise
            self._connection = await self._ask_again(broken)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """End the request, just as leaving the `async with` does."""
        connection = self._connection
        del self._connection
        self._pool.give_back(connection)

    async def _ask_on_new_connection(self) -> EngineConnection:
        connection = await self._pool.connect()
        await connection.ask(self._request)
        return connection

    async def _ask_again(self, broken: BrokenConnectionError) -> EngineConnection:
        try:
            return await self._ask_on_new_connection()
        except UnreachableError:
            # A socket that is closed with an unread request is reset; without a reset, the request may have killed the
            # engine, so it must not be sent to another one.
            if isinstance(broken.__cause__, ConnectionError):
                raise
            raise broken from None

    @property
    def status(self) -> int:
        return self._connection.status

    @property
    def content_type(self) -> str:
        """The Content-Type of the response, or empty if the engine did not send one."""
        return self._connection.content_type

    @property
    def arrived(self) -> float:
        """Arrival time of the bytes that `read_some` last returned, in seconds. See EngineConnection."""
        return self._connection.arrived

    @property
    def is_event_stream(self) -> bool:
        """Whether the response body consists of server-sent events."""
        return self._connection.content_type.startswith(_EVENT_STREAM)

    def read_some(self) -> Coroutine[object, object, bytes]:
        """Wait for more of the body and return the bytes that arrived together, at most about 64 KiB.

        The result is empty at the end of the body.

        Raises:
            BrokenConnectionError, SilenceError: the rest of the body will not arrive.
        """
        return self._connection.read_some()

    async def read(self) -> bytes:
        """Return the rest of the body.

        Raises:
            MalformedAnswerError: the body exceeds 64 MiB.
            BrokenConnectionError, SilenceError: see `read_some`.
        """
        parts, size = list[bytes](), 0
        while part := await self._connection.read_some():
            parts.append(part)
            size += len(part)
            if size > _MAX_BODY_BYTES:
                raise MalformedAnswerError(f"the engine's response has more than {_MAX_BODY_BYTES} bytes")
        return b"".join(parts)
