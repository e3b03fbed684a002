"""A connection to an engine's Unix socket. It carries one request at a time and streams the response.

Response bytes are buffered until they are read. While the buffer is full, nothing more is read from the
engine. This module knows nothing about versions, or about the content of requests and responses.
"""

import asyncio
from collections import deque
from time import perf_counter
from typing import cast

_MAX_BUFFERED_BYTES = 256 * 1024
"""Maximum number of unread response bytes. Reading pauses at this limit, but the last read may exceed it by up to the
same amount."""
_MAX_JOINED_BYTES = 64 * 1024
"""Maximum total size of chunks that are returned together, in bytes. A single chunk may be larger."""
_MAX_STRAY_BYTES = 64 * 1024
"""Maximum number of consecutive bytes that are not part of a body, i.e. the response head and chunk framing."""
_CONTENT_TYPE, _CONTENT_LENGTH, _TRANSFER_ENCODING = b"content-type", b"content-length", b"transfer-encoding"


class ConnectionFailedError(Exception):
    """Raised when a request cannot be sent or its response does not arrive."""


class UnreachableError(ConnectionFailedError):
    """Raised when the engine accepts no connection, and therefore cannot have received any part of the request."""


class BrokenConnectionError(ConnectionFailedError):
    """Raised when the connection breaks before the response is complete."""


class MalformedAnswerError(BrokenConnectionError):
    """Raised when a response is not valid HTTP/1.1 or exceeds a limit."""


class SilenceError(ConnectionFailedError):
    """Raised when no bytes have arrived for too long."""


class EngineConnection(asyncio.Protocol):
    """A connection to an engine. It sends one request at a time and keeps the response until the next request.

    Args:
        silence_s: maximum time to wait for the next bytes, in seconds.
        all_open: the pool's set of open connections, which contains this one while it is open.

    Attributes:
        status: HTTP status of the response, once its head has arrived.
        content_type: Content-Type of the response, once its head has arrived; empty if the engine did not
            send one.
        answered: whether at least one byte of the response has arrived.
        complete: whether the whole response has arrived.
        arrived: arrival time of the chunk that was last read, in seconds. The clock stops while reading is
            paused, so that the time between two chunks does not include delays caused by their reader.
        idle_since: time at which the last response was complete, on the event loop's clock.
    """

    def __init__(self, silence_s: float, all_open: "set[EngineConnection]") -> None:
        # Part of the extras for serving; an import of this module does not need it.
        from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

        self._loop = asyncio.get_running_loop()
        self._silence_s = silence_s
        self._all_open = all_open
        self._parser = HttpResponseParser(self)
        self._parser_errors = (HttpParserError, HttpParserUpgrade)
        self._transport: asyncio.Transport  # from `connection_made` on
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._error: ConnectionFailedError | None = None  # set once, when the connection is closed
        self._heard = self.idle_since = 0.0
        self._asked = self._usable = False
        self._paused_at: float | None = None  # None unless reading is paused
        self._reset()

    def _reset(self) -> None:
        self._parts = deque[tuple[float, bytes]]()  # with the time of each, as in `arrived`
        self._paused_s = self._part_arrived = self.arrived = 0.0
        self._waiting_bytes = self._stray_bytes = 0
        self._has_head = self._has_length = False
        self.status = 0
        self.content_type = ""
        self.answered = self.complete = False

    @property
    def is_closed(self) -> bool:
        """Whether the connection can no longer be used for requests."""
        return self._transport.is_closing()

    async def ask(self, request: bytes) -> None:
        """Send a request and wait for the head of its response.

        Raises:
            BrokenConnectionError, SilenceError: no response arrived. The connection has been closed.
        """
        if self._error is not None:
            raise self._error
        self._reset()
        self._asked = True
        self._heard = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._silence_s, self._check_silence)
        self._transport.write(request)
        try:
            while not self._has_head:
                await self._more()
        except BaseException:
            self.close()
            raise

    async def read_some(self) -> bytes:
        """Wait for more of the body and return the bytes that arrived together, at most about 64 KiB.

        The result is empty at the end of the body.

        Raises:
            BrokenConnectionError, SilenceError: the rest of the body will not arrive.
        """
        while not self._parts:
            if self.complete:
                return b""
            await self._more()
        part = self._next()
        if not self._parts:
            self._resume()
        return part

    def release(self) -> bool:
        """Finish the current response and return whether the connection can be reused. If it cannot, close it."""
        if not (self.complete and self._usable):
            self.close()
            return False
        self._asked = False
        self._parts.clear()
        self._resume()
        self.idle_since = self._loop.time()
        return True

    def close(self) -> None:
        """Close the connection immediately. The engine then cancels any unfinished request."""
        self._fail(BrokenConnectionError("the connection was closed by this process"))

    def _next(self) -> bytes:
        """Take the next chunk from the buffer, join any further chunks that arrived at the same time, up to about
        `_MAX_JOINED_BYTES`, and return the result.
        """
        self.arrived, first = self._parts.popleft()
        if not self._parts:  # nearly always true in a stream
            self._waiting_bytes = 0
            return first
        parts, size = [first], len(first)
        while self._parts:
            arrived, part = self._parts[0]
            if arrived != self.arrived or size + len(part) > _MAX_JOINED_BYTES:
                break
            self._parts.popleft()
            parts.append(part)
            size += len(part)
        self._waiting_bytes -= size
        return b"".join(parts)

    def _more(self) -> asyncio.Future[None]:
        """Return a future that completes as soon as bytes arrive or an error occurs.

        Callers await such futures in a loop until they have all the bytes they need.
        """
        if self._error is not None:
            raise self._error
        self._heard = self._loop.time()
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # the waiting task may have been cancelled
            waiter.set_result(None)

    def _fail(self, error: ConnectionFailedError) -> None:
        """Close the connection because of an error. Any part of the response that has already arrived can still be
        read.
        """
        self._usable = False
        if self._error is None:
            self._error = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._transport.abort()
        self._wake()

    def _check_silence(self) -> None:
        """Close the connection if no bytes have arrived for too long.

        This check runs at intervals rather than for every chunk.
        """
        self._timer = None
        if not self._asked:
            return
        now = self._loop.time()
        since = self._heard if self._waiter is not None else now  # without a waiting reader there is no silence
        if now - since >= self._silence_s:
            self._fail(SilenceError(f"the engine sent no data for {self._silence_s:g} s"))
        else:
            self._timer = self._loop.call_at(since + self._silence_s, self._check_silence)

    def _resume(self) -> None:
        if self._paused_at is None:
            return
        self._paused_s += perf_counter() - self._paused_at
        self._paused_at = None
        if self._usable:
            self._transport.resume_reading()

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's class is not a subclass
        self._usable = True
        self._all_open.add(self)

    def data_received(self, data: bytes) -> None:
        if not self._asked:  # bytes without a request
            self.close()
            return
        self.answered = True
        self._heard = self._loop.time()
        self._part_arrived = perf_counter() - self._paused_s
        self._stray_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except self._parser_errors as error:
            self._fail(MalformedAnswerError(f"the engine's response is not valid HTTP/1.1: {error!r}"))
            return
        if self._stray_bytes > _MAX_STRAY_BYTES:
            self._fail(
                MalformedAnswerError(f"the engine sent more than {_MAX_STRAY_BYTES} bytes outside the response body")
            )
            return
        if self._waiting_bytes > _MAX_BUFFERED_BYTES and self._paused_at is None:
            self._paused_at = perf_counter()
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        error = BrokenConnectionError("the engine closed the connection")
        error.__cause__ = exc
        self._fail(error)
        self._all_open.discard(self)

    # Called by the parser.

    def on_message_begin(self) -> None:
        """Reject a second response to the same request."""
        if self._has_head:
            raise ValueError("unexpected bytes after the response")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == _CONTENT_TYPE:
            self.content_type = value.decode("latin-1")
        elif name == _CONTENT_LENGTH or (name == _TRANSFER_ENCODING and value.lower() == b"chunked"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        """Check the response head. The length of the body must be known, because otherwise a truncated response would
        look complete.
        """
        if not self._has_length:
            raise ValueError("the response has neither Content-Length nor chunked encoding")
        if self._parser.get_http_version() != "1.1":
            raise ValueError(f"the response is HTTP/{self._parser.get_http_version()}, not HTTP/1.1")
        self.status = self._parser.get_status_code()
        if self.status < 200:
            raise ValueError(f"unexpected interim response: {self.status}")
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        self._parts.append((self._part_arrived, body))
        self._waiting_bytes += len(body)
        self._stray_bytes = 0

    def on_message_complete(self) -> None:
        self.complete = True
        self._usable = self._usable and self._parser.should_keep_alive()
