"""Lets a thread read a large request body while it arrives, so that hashing and writing never block the event loop."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future

from starlette.types import Receive

from serving.http.body import BodyTimeoutError, BodyTooLargeError, ClientGoneError

IDLE_S = 30.0
"""Maximum wait for the next part of a body, in seconds."""
MIN_BYTES_PER_S = 16 * 1024
"""Minimum average rate of a body after its first `IDLE_S` seconds."""


class ThreadedBody:
    """A request body. The event loop receives it, and one thread iterates over its parts.

    Create it in the event loop. Only one part is in memory at a time, in addition to the data that the server has read
    ahead.

    Args:
        max_bytes: maximum size of the body.
        idle_s: see `IDLE_S`.
    """

    def __init__(self, receive: Receive, *, max_bytes: int, idle_s: float = IDLE_S) -> None:
        self._loop = asyncio.get_running_loop()
        self._receive = receive
        self._max_bytes = max_bytes
        self._idle_s = idle_s
        self._started = self._loop.time()
        self._size = 0
        self._next: Future[tuple[bytes, bool]] | None = None
        self._stopped = False

    def __iter__(self) -> Iterator[bytes]:
        """Yield the parts of the body. Call this in a thread.

        Raises:
            BodyTooLargeError: the body is larger than the maximum.
            BodyTimeoutError: the client sends too slowly.
            ClientGoneError: the client disconnected, or `stop` was called.
        """
        more = True
        while more:
            part, more = self._wait()
            self._size += len(part)
            if self._size > self._max_bytes:
                raise BodyTooLargeError("the request body is too large", expected=f"at most {self._max_bytes} bytes")
            yield part

    def stop(self) -> None:
        """Make the thread stop. Call this in the event loop."""
        self._stopped = True
        if self._next is not None:
            self._next.cancel()

    def _wait(self) -> tuple[bytes, bool]:
        self._next = asyncio.run_coroutine_threadsafe(self._receive_part(), self._loop)
        try:
            # An event loop that has ended never answers.
            return self._next.result(2 * self._idle_s)
        except (CancelledError, TimeoutError) as error:
            raise ClientGoneError from error

    async def _receive_part(self) -> tuple[bytes, bool]:
        if self._stopped:
            raise ClientGoneError
        now = self._loop.time()
        late = self._started + self._idle_s + self._size / MIN_BYTES_PER_S
        try:
            async with asyncio.timeout_at(min(now + self._idle_s, late)):
                message = await self._receive()
        except TimeoutError as error:
            raise BodyTimeoutError(
                "the request body arrived too slowly",
                expected=f"at least {MIN_BYTES_PER_S} bytes per second, and no pause longer than {self._idle_s:g} s",
            ) from error
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        return message.get("body", b""), message.get("more_body", False)
