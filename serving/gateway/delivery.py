"""Sends an answer to its client from a buffer, so that engines and swaps never wait for slow readers.

Buffers are bounded per answer, per caller and in total. When they are full, a stream is read from the engine no faster
than its client reads, and an answer that is not streamed is rejected. A client that reads too slowly is disconnected,
which frees its buffer. On a writable connection, data is sent immediately. The buffer, and the task that empties it,
are used only when the connection is not writable. This module knows nothing about engines or the content of answers.
"""

import asyncio
from contextlib import nullcontext
from types import TracebackType
from typing import Self

from starlette.types import Send

from serving.admission.errors import OverloadedError
from serving.http.connections import Connection
from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import SvcError

PART_BYTES = 64 * 1024
"""Maximum size of one write to a connection, in bytes. uvicorn buffers the same amount again, so a client is
disconnected if it has read less than about twice that size within `CLIENT_TIMEOUT_S`."""
MAX_ANSWER_BYTES = 16 * 2**20
"""Maximum size of a non-streamed answer, and of the buffered part of a stream, in bytes."""
CLIENT_TIMEOUT_S = 30.0
"""Seconds that a client has to read the next part of its answer before it is disconnected."""


class ClientSlowError(Exception):
    """Raised when a client reads its response too slowly and is disconnected."""


@answered_with(400, ErrorCode.ANSWER_TOO_LARGE)
class AnswerTooLargeError(SvcError):
    """Raised when an answer, or a single event in it, exceeds the size limit."""


class AnswerBuffers:
    """Tracks the memory used by all answers that are waiting to be read by their clients.

    Args:
        max_bytes: limit for all answers combined. One caller may use half of this memory, or enough for one answer if
            that is more, so that callers that read slowly leave memory for other callers.
        max_answer_bytes: limit for a single answer.
        client_timeout_s: time within which a client must read the next part of its answer, in seconds.

    Attributes:
        used: number of bytes in use.
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
        """Return the total size of a caller's answers that are buffered, in bytes."""
        return self._held.get(caller, 0)

    def take(self, size: int, held: int, caller: str) -> bool:
        """Reserve `size` more bytes for an answer that already holds `held` bytes. Return False if there is not enough
        memory.
        """
        if held + size > self.max_answer_bytes or self.used + size > self._max_bytes:
            return False
        of_caller = self.held_by(caller) + size
        if of_caller > self._max_caller_bytes:
            return False
        self.used += size
        self._held[caller] = of_caller
        return True

    def free(self, size: int, caller: str) -> None:
        if size:
            self.used -= size
            self._held[caller] -= size
            if not self._held[caller]:
                del self._held[caller]
        self._freed.set()

    async def freed(self) -> None:
        """Wait until some buffer memory has been released."""
        self._freed.clear()
        await self._freed.wait()


class Delivery:
    """Delivers one answer to its client. Leaving the `async with` block waits until everything has been sent.

    If the block raises an exception after calling `start`, the caller must end the answer with `send_last`, or
    disconnect the client.

    Args:
        send: the ASGI callable.
        connection: the connection that `send` writes to.
        caller: key or address whose share of the buffers the answer uses.

    Attributes:
        begun: whether `start` was called.
    """

    def __init__(self, send: Send, buffers: AnswerBuffers, connection: Connection, caller: str) -> None:
        self._send = send
        self._buffers = buffers
        self._connection = connection
        self._caller = caller
        self._headers: list[tuple[bytes, bytes]] | None = None  # until they are sent
        self._waiting = bytearray()
        self._held = 0  # bytes that wait, are reserved, or are being sent
        self._filled = asyncio.Event()
        self._ended = False
        self._sending: asyncio.Task[None] | None = None  # from the first time that the connection was not writable
        self.begun = False

    @property
    def pending(self) -> bool:
        """Whether part of the answer has not been sent yet."""
        return self._held > 0 or self._headers is not None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until the rest of the answer has been sent, and release its memory.

        Raises:
            ClientSlowError: the client read too slowly.
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
            self._buffers.free(self._held, self._caller)  # the part that will not be sent; the answer stays `pending`

    def start(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Set the headers of a successful response. They are sent along with the first part of its body."""
        self._headers, self.begun = headers, True

    def reserve(self, size: int) -> None:
        """Reserve memory for a part of a non-streamed answer.

        The complete answer is passed to `put` later.

        Raises:
            AnswerTooLargeError: the answer exceeds the size limit.
            OverloadedError: the buffers, or the caller's share of them, are full. Waiting for memory could
                deadlock, because half-read answers would wait for each other.
        """
        if self._held + size > self._buffers.max_answer_bytes:
            raise _too_large(self._held + size, self._buffers.max_answer_bytes)
        if not self._buffers.take(size, self._held, self._caller):
            raise OverloadedError(
                f"{self._buffers.used} bytes of answers are buffered for clients that have not read them yet, "
                f"{self._buffers.held_by(self._caller)} bytes of them for {self._caller or 'this client'}",
                todo="retry the request later",
            )
        self._held += size

    def give_back(self, size: int) -> None:
        """Release reserved memory that the complete answer does not need."""
        self._held -= size
        self._buffers.free(size, self._caller)

    def put(self, data: bytes) -> None:
        """Add data to the send buffer. Memory for it must have been reserved."""
        self._waiting += data
        self._filled.set()

    async def put_event(self, data: bytes) -> None:
        """Send one part of a streamed answer.

        If the connection is not writable, the part is buffered as soon as the buffers have memory for it.

        Raises:
            AnswerTooLargeError: this part alone exceeds the size limit of an answer.
            ClientSlowError: the client was disconnected.
        """
        if self._connection.is_writable and not self._held and len(data) <= PART_BYTES:
            if self._headers is not None:
                await self._send_head(self._headers)
            if self._connection.is_writable:  # the headers may have filled it
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
        """Send the final part of an answer that failed. Call this after the `async with` block.

        Raises:
            ClientSlowError: the client read too slowly.
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
            self._buffers.free(0, self._caller)  # wakes a `put_event` that waits for memory

    async def _send_waiting(self, *, end: bool = False) -> None:
        """Send the buffered data in parts of up to `PART_BYTES`, so that several small events are sent in one write.

        Args:
            end: whether the last part ends the answer.
        """
        more = bool(self._waiting) or end
        while more:
            part = bytes(self._waiting[:PART_BYTES])
            del self._waiting[:PART_BYTES]
            more = bool(self._waiting)
            await self._send_part(part, more=more or not end)
            self.give_back(len(part))

    async def _send_part(self, data: bytes, *, more: bool) -> None:
        immediate = self._connection.is_writable and self._headers is None  # else the headers may fill it
        waiting = nullcontext() if immediate else asyncio.timeout(self._buffers.client_timeout_s)
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
        f"the response exceeds the limit of {most} bytes: it has {size} so far",
        expected="fewer answers ('n'), tokens or log-probabilities per request, or 'stream': true",
    )
