"""One connection to an engine's unix socket: requests of clients one after the other, each with its answer as it comes.

Bytes of an answer wait here until they are taken, and no more than so many: the engine is not read from then. Knows
nothing of versions, nor of what a request or an answer says.
"""

import asyncio
from collections import deque
from time import perf_counter
from typing import cast

_MOST_WAITING_BYTES = 256 * 1024
"""Of an answer, not taken yet. As much again may come with the last read."""
_MOST_AT_ONCE_BYTES = 64 * 1024
"""Of parts that are taken together; one may be larger."""
_MOST_STRAY_BYTES = 64 * 1024
"""In a row that are no part of a body: the head of an answer, and what stands around its chunks."""
_CONTENT_TYPE, _CONTENT_LENGTH, _TRANSFER_ENCODING = b"content-type", b"content-length", b"transfer-encoding"


class ConnectionFailedError(Exception):
    """A request could not be made, or its answer did not come."""


class UnreachableError(ConnectionFailedError):
    """The engine took no connection; it has seen nothing of the request."""


class BrokenConnectionError(ConnectionFailedError):
    """The connection broke before the answer was complete."""


class MalformedAnswerError(BrokenConnectionError):
    """The answer is not HTTP/1.1, or over a limit."""


class SilenceError(ConnectionFailedError):
    """No byte came for too long."""


class EngineConnection(asyncio.Protocol):
    """Sends a request, and has its answer until the next request.

    Args:
        silence_s: longest wait for the next bytes, seconds.
        all_open: it is in this set from when it is connected until it is closed.

    Attributes:
        status: of the answer, once its head has come.
        content_type: of the answer, likewise; empty where the engine says none.
        answered: at least a byte of the answer has come.
        complete: all of the answer has come.
        arrived: when the part that was taken last came, seconds. The clock stands still while the engine is not read
            from, so that the difference of two parts has none of the time for which their reader was late.
        idle_since: when the last answer was done with, by the loop's clock.
    """

    def __init__(self, silence_s: float, all_open: "set[EngineConnection]") -> None:
        # Comes with the extras for serving; who only imports this can do without.
        from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

        self._loop = asyncio.get_running_loop()
        self._silence_s = silence_s
        self._all_open = all_open
        self._parser = HttpResponseParser(self)
        self._parser_errors = (HttpParserError, HttpParserUpgrade)
        self._transport: asyncio.Transport  # from `connection_made` on
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._error: ConnectionFailedError | None = None  # once there is one, the connection is closed for good
        self._heard = self.idle_since = 0.0
        self._asked = self._usable = False
        self._paused_at: float | None = None  # None while the engine is read from
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
        """It takes no request any more."""
        return self._transport.is_closing()

    async def ask(self, request: bytes) -> None:
        """Sends a request and returns when the head of its answer has come.

        Raises:
            BrokenConnectionError, SilenceError: there is no answer; the connection is closed.
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
        """Return the next bytes of the body that came together, as soon as there are some; nothing at its end.

        They are at most about 64 KiB.

        Raises:
            BrokenConnectionError, SilenceError: the rest will not come.
        """
        while not self._parts:
            if self.complete:
                return b""
            await self._more()
        taken = self._next()
        if not self._parts:
            self._read_on()
        return taken

    def release(self) -> bool:
        """Ends the work on an answer; whether the connection can take the next request. It is closed where not."""
        if not (self.complete and self._usable):
            self.close()
            return False
        self._asked = False
        self._parts.clear()
        self._read_on()
        self.idle_since = self._loop.time()
        return True

    def close(self) -> None:
        """Closes it at once: the engine ends its work on what was not answered."""
        self._fail(BrokenConnectionError("the connection was closed here"))

    def _next(self) -> bytes:
        """Return the parts that came first and together, up to about `_MOST_AT_ONCE_BYTES`."""
        self.arrived, taken = self._parts.popleft()
        if not self._parts:  # as nearly always in a stream
            self._waiting_bytes = 0
            return taken
        parts, size = [taken], len(taken)
        while self._parts:
            arrived, part = self._parts[0]
            if arrived != self.arrived or size + len(part) > _MOST_AT_ONCE_BYTES:
                break
            self._parts.popleft()
            parts.append(part)
            size += len(part)
        self._waiting_bytes -= size
        return b"".join(parts)

    def _more(self) -> asyncio.Future[None]:
        """Done when something has come, or an error in its place; whoever lacks something then calls it again."""
        if self._error is not None:
            raise self._error
        self._heard = self._loop.time()
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():  # who waits may have been cancelled
            waiter.set_result(None)

    def _fail(self, error: ConnectionFailedError) -> None:
        """Closes the connection; what has come of the answer can still be read."""
        self._usable = False
        if self._error is None:
            self._error = error
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._transport.abort()
        self._wake()

    def _check_silence(self) -> None:
        """Runs once in a while, and not for each part: it looks when the last one came."""
        self._timer = None
        if not self._asked:
            return
        now = self._loop.time()
        since = self._heard if self._waiter is not None else now  # who takes nothing cannot complain
        if now - since >= self._silence_s:
            self._fail(SilenceError(f"the engine said nothing for {self._silence_s:g} s"))
        else:
            self._timer = self._loop.call_at(since + self._silence_s, self._check_silence)

    def _read_on(self) -> None:
        if self._paused_at is None:
            return
        self._paused_s += perf_counter() - self._paused_at
        self._paused_at = None
        if self._usable:
            self._transport.resume_reading()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class
        self._usable = True
        self._all_open.add(self)

    def data_received(self, data: bytes) -> None:
        """Takes a part of an answer."""
        if not self._asked:  # nobody asked
            self.close()
            return
        self.answered = True
        self._heard = self._loop.time()
        self._part_arrived = perf_counter() - self._paused_s
        self._stray_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except self._parser_errors as error:
            self._fail(MalformedAnswerError(f"the engine's answer is not HTTP/1.1: {error!r}"))
            return
        if self._stray_bytes > _MOST_STRAY_BYTES:
            self._fail(MalformedAnswerError(f"over {_MOST_STRAY_BYTES} bytes of the answer are no part of its body"))
            return
        if self._waiting_bytes > _MOST_WAITING_BYTES and self._paused_at is None:
            self._paused_at = perf_counter()
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends."""
        error = BrokenConnectionError("the engine closed the connection")
        error.__cause__ = exc
        self._fail(error)
        self._all_open.discard(self)

    # What the parser calls.

    def on_message_begin(self) -> None:
        """One answer to a request; anything behind it is none."""
        if self._has_head:
            raise ValueError("bytes after the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps what is needed."""
        name = name.lower()
        if name == _CONTENT_TYPE:
            self.content_type = value.decode("latin-1")
        elif name == _CONTENT_LENGTH or (name == _TRANSFER_ENCODING and value.lower() == b"chunked"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        """Only an answer that says where it ends can be told from one that broke off."""
        if not self._has_length:
            raise ValueError("neither content-length nor chunks")
        if self._parser.get_http_version() != "1.1":
            raise ValueError("another version of HTTP")
        self.status = self._parser.get_status_code()
        if self.status < 200:
            raise ValueError("a step of an upgrade that nobody asked for")
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        """Keeps a part until it is taken."""
        self._parts.append((self._part_arrived, body))
        self._waiting_bytes += len(body)
        self._stray_bytes = 0

    def on_message_complete(self) -> None:
        """The answer has an end."""
        self.complete = True
        self._usable = self._usable and self._parser.should_keep_alive()
