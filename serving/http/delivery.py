"""Hands an answer to its client from a buffer, so that no engine, and no swap, waits for a client that reads slowly.

What waits in buffers is bounded, for one answer, for one caller and for all together: where there is no room, a stream
is read from the engine no faster than its client takes it, and a whole answer is refused. A client that takes too
little is cut off, so that what waits goes away. A connection that takes what comes gets it at once: the buffer, and the
task that empties it, are for those that do not. Knows nothing of engines or of what an answer says.
"""

import asyncio
from contextlib import nullcontext
from types import TracebackType
from typing import Self

from starlette.types import Send

from serving.admission.errors import OverloadedError
from serving.http.connections import Connection
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

    Attributes:
        used: bytes that wait now.
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
        """Wait until room has been given back."""
        self._freed.clear()
        await self._freed.wait()


class Delivery:
    """One answer on its way to its client; leaving the `async with` waits until the client has what was given.

    Where the body raised, the answer is not ended: `send_last` does that, or nobody.

    Args:
        send: ASGI's.
        connection: what `send` writes to.
        caller: whose share of the buffers it takes.

    Attributes:
        begun: the head of the answer was given.
    """

    def __init__(self, send: Send, buffers: AnswerBuffers, connection: Connection, caller: str) -> None:
        self._send = send
        self._buffers = buffers
        self._connection = connection
        self._caller = caller
        self._headers: list[tuple[bytes, bytes]] | None = None  # until they are sent
        self._waiting = bytearray()
        self._held = 0  # what waits, is reserved, or is being sent
        self._filled = asyncio.Event()
        self._ended = False
        self._sending: asyncio.Task[None] | None = None  # once the connection has not taken what came
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
        """Wait for the client.

        Raises:
            ClientSlowError: it took too little.
        """
        try:
            if self._sending is not None:
                if isinstance(error, asyncio.CancelledError):
                    self._sending.cancel()
                self._ended = True
                self._filled.set()
                await self._sending
            if error is None and self.begun:
                await self._send_waiting(end=True)
        finally:
            self._buffers.free(self._held, self._caller)  # what will not be sent any more; it stays `pending`

    def start(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Give the head of a good answer; it goes out with the first part."""
        self._headers, self.begun = headers, True

    def reserve(self, size: int) -> None:
        """Take room for a part of a whole answer, which is `put` when it is complete.

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

    def put(self, data: bytes) -> None:
        """Add a part that has room: it was reserved."""
        self._waiting += data
        self._filled.set()

    async def put_event(self, data: bytes) -> None:
        """Add a part of a stream; wait until the buffers have room for it.

        Raises:
            AnswerTooLargeError: it alone is larger than an answer may be.
            ClientSlowError: the client was cut off.
        """
        if self._connection.is_writable and not self._held and len(data) <= PART_BYTES:
            if self._headers is not None:
                await self._send_head(self._headers)
            if self._connection.is_writable:  # the head may have filled it
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
                return
        if len(data) > self._buffers.max_answer_bytes:
            raise _too_large(len(data), self._buffers.max_answer_bytes)
        if self._sending is None:
            self._sending = asyncio.create_task(self._run())
        self._check()
        while not self._buffers.take(len(data), self._held, self._caller):
            await self._buffers.freed()
            self._check()
        self._held += len(data)
        self.put(data)

    async def send_last(self, data: bytes) -> None:
        """End an answer that broke, once the `async with` was left.

        Raises:
            ClientSlowError: the client took too little.
        """
        await self._send_part(data, more=False)

    def _check(self) -> None:
        if self._sending is not None and self._sending.done():
            self._sending.result()

    async def _run(self) -> None:
        try:
            await self._send_waiting()
            while not self._ended or self._waiting:
                await self._filled.wait()
                self._filled.clear()
                await self._send_waiting()
        finally:
            self._buffers.free(0, self._caller)  # wakes a `put_event` that waits for room

    async def _send_waiting(self, *, end: bool = False) -> None:
        """Send what waits, in parts: many small events make one write. The last part may be the end of the answer."""
        more = bool(self._waiting) or end
        while more:
            part = bytes(self._waiting[:PART_BYTES])
            del self._waiting[:PART_BYTES]
            more = bool(self._waiting)
            await self._send_part(part, more=more or not end)
            self.give_back(len(part))

    async def _send_part(self, data: bytes, *, more: bool) -> None:
        at_once = self._connection.is_writable and self._headers is None  # else the head may fill it
        waiting = nullcontext() if at_once else asyncio.timeout(self._buffers.client_timeout_s)
        try:
            async with waiting:
                if self._headers is not None:
                    await self._send_head(self._headers)
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError as error:
            raise ClientSlowError from error

    async def _send_head(self, headers: list[tuple[bytes, bytes]]) -> None:
        self._headers = None
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})


def _too_large(size: int, most: int) -> AnswerTooLargeError:
    return AnswerTooLargeError(
        f"the answer is larger than {most} bytes: {size} so far",
        expected="fewer answers (n), tokens or log-probabilities in one request, or 'stream': true",
    )
