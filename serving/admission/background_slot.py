"""A low-priority slot for the server's own requests, separate from the slots for clients.

A request in this slot does not count as running, and no client waits for it. The slot is available while admission is
open and there is an engine. When the engine is about to be replaced, reloaded or stopped, the request in the slot is
cancelled, because waiting for its answer could delay a swap for too long.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class BackgroundSlotEndedError(Exception):
    """Raised when the server's own request was cancelled because of a swap or because its engine was stopped.

    The request may be sent again.
    """


class BackgroundSlot:
    """A single slot shared by the server's own requests.

    Attributes:
        taken: timeout that cancels the request in the slot, or None if the slot is free.
    """

    def __init__(self) -> None:
        self._open, self._quiet = asyncio.Event(), asyncio.Event()
        self.taken: asyncio.Timeout | None = None

    def show(self, *, open: bool, running: int) -> None:
        """Update the state that `take` waits for.

        Args:
            open: whether admission is open and there is an engine.
            running: number of running client requests.
        """
        quiet = open and not running
        if open is not self._open.is_set() or quiet is not self._quiet.is_set():  # called for every request
            _set(self._open, open)
            _set(self._quiet, quiet)

    @asynccontextmanager
    async def take(self, patience_s: float) -> AsyncIterator[None]:
        """Wait until no client request is running, then hold the slot while the `with` body runs.

        Args:
            patience_s: longest wait for clients' requests to finish, in seconds. After that, the body runs
                concurrently with them.

        Raises:
            BackgroundSlotEndedError: the body was cancelled by `end`.
            RuntimeError: the slot is already taken.
        """
        await self._wait(patience_s)
        if self.taken is not None:
            raise RuntimeError("a background request is already running")
        try:
            async with asyncio.timeout(None) as self.taken:
                yield
        except TimeoutError as error:
            if self.taken is None or not self.taken.expired():
                raise
            raise BackgroundSlotEndedError from error
        finally:
            self.taken = None

    def end(self) -> None:
        """Cancel the background request that holds the slot, if any. Called before the engine is replaced, reloaded or
        stopped.
        """
        if self.taken is not None and not self.taken.expired():
            self.taken.reschedule(asyncio.get_running_loop().time())

    async def _wait(self, patience_s: float) -> None:
        """Wait until admission is open and no request is running.

        After `patience_s` seconds, wait only until admission is open, even if requests are running.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await _until_set(self._quiet)
        await _until_set(self._open)


def _set(event: asyncio.Event, value: bool) -> None:
    if value:
        event.set()
    else:
        event.clear()


async def _until_set(event: asyncio.Event) -> None:
    """Wait until the event is set and is still set when the waiting task resumes."""
    while not event.is_set():
        await event.wait()
