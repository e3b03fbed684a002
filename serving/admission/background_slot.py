"""A slot for the server's own request, in addition to those of clients and with a lower priority.

The request is not counted, and no client waits for it. The slot is available while admission is open and there is an
engine; otherwise the request is cancelled: a swap does not wait for its answer, which could take longer than the swap
may take.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class BackgroundSlotEndedError(Exception):
    """The server's own request was cancelled, for a swap or because the engine stopped; it may be sent again."""


class BackgroundSlot:
    """The only slot for the server's own requests."""

    def __init__(self) -> None:
        self._open, self._quiet = asyncio.Event(), asyncio.Event()
        self._taken: asyncio.Timeout | None = None

    @property
    def taken(self) -> bool:
        """Whether one of the server's own requests holds the slot."""
        return self._taken is not None

    def show(self, *, open: bool, running: int) -> None:
        """Set whether admission is open, and how many requests run."""
        quiet = open and not running
        if open is not self._open.is_set() or quiet is not self._quiet.is_set():  # called for every request
            _set(self._open, open)
            _set(self._quiet, quiet)

    @asynccontextmanager
    async def take(self, patience_s: float) -> AsyncIterator[None]:
        """Wait for a moment without requests, and hold the slot during the body.

        Args:
            patience_s: longest wait for such a moment; after it, the body runs concurrently with clients' requests.

        Raises:
            BackgroundSlotEndedError: the body was cancelled.
            RuntimeError: the slot is taken.
        """
        await self._wait(patience_s)
        if self._taken is not None:
            raise RuntimeError("a background request runs already")
        try:
            async with asyncio.timeout(None) as self._taken:
                yield
        except TimeoutError as error:
            if self._taken is None or not self._taken.expired():
                raise
            raise BackgroundSlotEndedError from error
        finally:
            self._taken = None

    def end(self) -> None:
        """Cancel the server's own request, if one runs: its engine is about to be changed."""
        if self._taken is not None and not self._taken.expired():
            self._taken.reschedule(asyncio.get_running_loop().time())

    async def _wait(self, patience_s: float) -> None:
        """Wait until admission is open and no request runs, or after `patience_s` until it is open."""
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
    """Return when the event is set, and still is when the waiter's turn comes."""
    while not event.is_set():
        await event.wait()
