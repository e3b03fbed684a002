"""Hands an answer to its client from a buffer, so that no engine, and no swap, waits for a client that reads slowly.

What waits in buffers is bounded, for one answer, for one caller and for all together: where there is no room, a stream
is read from the engine no faster than its client takes it, and a whole answer is refused. A client that takes too
little is cut off, so that what waits goes away. A connection that takes what comes gets it at once: the buffer, and the
task that empties it, are for those that do not. Knows nothing of engines or of what an answer says.
"""

import asyncio
from collections import deque
from types import TracebackType
from typing import Self

from starlette.types import Scope, Send

from serving.admission.errors import OverloadedError
from serving.http.authentication import caller_of
from serving.http.direct_answer import DirectAnswer, direct_answer
from serving.http.header_lines import HeaderLines, headers_in
from svc.errors import SvcError

PART_BYTES = 64 * 1024
"""Of one write to a connection. The server in front holds as much again, so that a client which is cut off took less
than about twice that within `CLIENT_TIMEOUT_S`."""
MAX_ANSWER_BYTES = 16 * 2**20
"""Largest answer that is not streamed, and most of a stream that waits."""
CLIENT_TIMEOUT_S = 30.0
"""A client that takes longer for the next part of its answer is cut off."""


class ClientSlowError(Exception):
    """The client took too little of its answer; it is cut off."""


class AnswerTooLargeError(SvcError):
    """An answer, or an event of one, over the limit."""


class AnswerBuffers:
    """How much of all answers waits for clients.

    Args:
        max_bytes: of all answers together. One caller may have half of them, and always one answer: callers that read
            slowly leave room for the others.
        max_answer_bytes: of one answer.
        client_timeout_s: longest time for a client to take a part, seconds.
    """

    def __init__(
        self, *, max_bytes: int, max_answer_bytes: int = MAX_ANSWER_BYTES, client_timeout_s: float = CLIENT_TIMEOUT_S
    ) -> None:
        self.client_timeout_s = client_timeout_s
        self.max_answer_bytes = max_answer_bytes
        self._max_bytes = max_bytes
        self._max_caller_bytes = max(max_bytes // 2, max_answer_bytes)
        self._held: dict[str, int] = {}
        self._freed = asyncio.Event()
        self.used = 0
        """Bytes that wait now."""

    def held_by(self, caller: str) -> int:
        """Return how many bytes wait for one caller."""
        return self._held.get(caller, 0)

    def take(self, size: int, held: int, caller: str) -> bool:
        """Take room for `size` bytes of an answer that has `held` already; return whether there was any."""
        if held + size > self.max_answer_bytes or self.used + size > self._max_bytes:
            return False
        of_caller = self.held_by(caller) + size
        if of_caller > self._max_caller_bytes:
            return False
        self.used += size
        self._held[caller] = of_caller
        return True

    def free(self, size: int, caller: str) -> None:
        """Give room back."""
        if size:
            self.used -= size
            self._held[caller] -= size
            if not self._held[caller]:
                del self._held[caller]
        self._freed.set()

    async def freed(self) -> None:
        """Returns when room was given back since."""
        self._freed.clear()
        await self._freed.wait()


class Delivery:
    """One answer on its way to its client; leaving the `async with` waits until the client has what was given.

    Where the body raised, the answer is not ended: `send_last` does that, or nobody.

    Args:
        send: the connection.
        timeout_s: longest time for a part to find its way, seconds.
        direct: the shorter way to it, for what it takes at once; None where there is none.
        caller: whose share of the buffers it takes.

    Attributes:
        begun: the head of the answer was given.
    """

    def __init__(
        self, send: Send, buffers: AnswerBuffers, timeout_s: float, direct: DirectAnswer | None, caller: str
    ) -> None:
        self._send = send
        self._direct = direct
        self._buffers = buffers
        self._timeout_s = timeout_s
        self._caller = caller
        self._headers: HeaderLines | None = None
        self._length: int | None = None
        self._parts: deque[bytes] = deque()
        self._held = 0
        self._filled: asyncio.Event | None = None  # there is one where the connection does not take what comes
        self._ended = self._whole = False
        self._sending: asyncio.Task[None] | None = None
        self.begun = False

    @property
    def pending(self) -> bool:
        """Something was not handed over yet."""
        return self._held > 0 or self._headers is not None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the client.

        Raises:
            ClientSlowError: it took too little.
        """
        whole = error is None
        try:
            if self._sending is not None:
                if isinstance(error, asyncio.CancelledError):
                    self._sending.cancel()
                self._ended, self._whole = True, whole
                self._fill()
                await self._sending
            elif whole and self.begun:
                await self._end()
        finally:
            self._buffers.free(self._held, self._caller)  # what will not be sent any more; it stays `pending`

    def start(self, headers: HeaderLines, *, length: int | None = None) -> None:
        """The head of a good answer; it goes out with the first part.

        Args:
            headers: without its length.
            length: of a whole answer, bytes; None for a stream.
        """
        self._headers, self._length, self.begun = headers, length, True

    def reserve(self, size: int) -> None:
        """Takes room for a part of a whole answer, which is `put` when it is complete.

        Raises:
            AnswerTooLargeError: the answer is larger than one may be.
            OverloadedError: there is no room among all others, or among the caller's. Not waited for: answers that are
                half read would wait for each other.
        """
        if self._held + size > self._buffers.max_answer_bytes:
            raise _too_large(self._held + size, self._buffers.max_answer_bytes)
        if not self._buffers.take(size, self._held, self._caller):
            raise OverloadedError(
                f"{self._buffers.used} bytes of answers wait for their clients, "
                f"{self._buffers.held_by(self._caller)} of them for {self._caller or 'here'}",
                todo="send the request again later",
            )
        self._held += size

    def give_back(self, size: int) -> None:
        """Return reserved memory that the complete answer does not need."""
        self._held -= size
        self._buffers.free(size, self._caller)

    async def put_event(self, data: bytes) -> None:
        """Adds a part of a stream, after a wait where there is no room for it.

        Raises:
            AnswerTooLargeError: it alone is larger than an answer may be.
            ClientSlowError: the client was cut off.
        """
        if self.put_at_once(data):
            return
        if len(data) > self._buffers.max_answer_bytes:
            raise _too_large(len(data), self._buffers.max_answer_bytes)
        if self._sending is None:
            self._sending = asyncio.create_task(self._run(asyncio.Event()))
        self._check()
        while not self._buffers.take(len(data), self._held, self._caller):
            await self._buffers.freed()
            self._check()
        self._held += len(data)
        self.put(data)

    def put_at_once(self, data: bytes) -> bool:
        """Hands a part of a stream to the connection, if that takes it without a wait; whether it did."""
        direct = self._direct
        if direct is None or self._held or len(data) > PART_BYTES:
            return False
        if self._headers is None:
            return direct.write(data)
        if not direct.is_writable:
            return False
        headers, self._headers = self._headers, None
        direct.begin(headers, data)
        return True

    def put(self, data: bytes) -> None:
        """Adds a part that has room: it was reserved."""
        self._parts.append(data)
        self._fill()

    async def send_last(self, data: bytes) -> None:
        """Ends an answer that broke, once the `async with` was left.

        Raises:
            ClientSlowError: the client took too little.
        """
        try:
            await self._send_part(data, more=False)
        except TimeoutError as error:
            raise ClientSlowError from error

    def _check(self) -> None:
        if self._sending is not None and self._sending.done():
            self._sending.result()

    def _fill(self) -> None:
        if self._filled is not None:
            self._filled.set()

    async def _end(self) -> None:
        """What there is of a whole answer, and the end."""
        direct, held = self._direct, self._held
        if direct is None or held > PART_BYTES or not direct.is_writable:
            self._ended = self._whole = True
            await self._run(asyncio.Event())
        elif self._headers is None:
            direct.end()
        else:
            headers, self._headers, self._held = self._headers, None, 0
            direct.write_whole(headers, b"".join(self._parts))
            self._buffers.free(held, self._caller)

    async def _run(self, filled: asyncio.Event) -> None:
        self._filled = filled
        filled.set()
        try:
            while not (self._ended and not self._parts):
                await filled.wait()
                filled.clear()
                while self._parts:
                    await self._send_next()
            if self._whole and self.begun:
                await self._send_part(b"", more=False)
        except TimeoutError as error:
            raise ClientSlowError from error
        finally:
            self._buffers.free(0, self._caller)  # wakes a `put_event` that waits for room

    async def _send_next(self) -> None:
        """What waits, up to a part's size: many small events make one write."""
        some = [self._parts.popleft()]
        size = len(some[0])
        while self._parts and size + len(self._parts[0]) <= PART_BYTES:
            some.append(self._parts.popleft())
            size += len(some[-1])
        data = some[0] if len(some) == 1 else b"".join(some)
        for start in range(0, size, PART_BYTES):
            part = data[start : start + PART_BYTES]
            await self._send_part(part, more=True)
            self._held -= len(part)
            self._buffers.free(len(part), self._caller)

    async def _send_part(self, data: bytes, *, more: bool) -> None:
        async with asyncio.timeout(self._timeout_s):
            await self._pass_on(data, more=more)

    async def _pass_on(self, data: bytes, *, more: bool) -> None:
        if self._headers is not None:
            headers = headers_in(self._headers)
            if self._length is not None:
                headers.append((b"content-length", b"%d" % self._length))
            self._headers = None
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def delivery_of(scope: Scope, send: Send, buffers: AnswerBuffers) -> Delivery:
    """The delivery of the answer to a request.

    Args:
        scope: its connection, which may have a shorter way to it, and whose caller was let in.
    """
    return Delivery(send, buffers, buffers.client_timeout_s, direct_answer(scope), caller_of(scope))


def _too_large(size: int, most: int) -> AnswerTooLargeError:
    return AnswerTooLargeError(
        f"the answer is larger than {most} bytes: {size} so far",
        expected="fewer answers (n), tokens or log-probabilities in one request, or 'stream': true",
    )
