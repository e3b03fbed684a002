"""A slot for the server's own requests, in addition to the clients' slots and with a lower priority.

Such a request does not count as running, and no client waits for it. The slot is available while admission is open and
there is an engine; otherwise the request is cancelled, because its answer could take longer than a swap may wait.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class BackgroundSlotEndedError(Exception):
    """Raised when the server's own request was cancelled for a swap or an engine's stop; it may be sent again."""


class BackgroundSlot:
    """The only slot for the server's own requests.

    Attributes:
        taken: time limit of the request that holds the slot; None if none does.
    """

    def __init__(self) -> None:
        self._open, self._quiet = asyncio.Event(), asyncio.Event()
        self.taken: asyncio.Timeout | None = None

    def show(self, *, open: bool, running: int) -> None:
        """Set whether admission is open, and how many requests run."""
        quiet = open and not running
        if open is not self._open.is_set() or quiet is not self._quiet.is_set():  # called for every request
            _set(self._open, open)
            _set(self._quiet, quiet)

    @asynccontextmanager
    async def take(self, patience_s: float) -> AsyncIterator[None]:
        """Wait until no client's request runs, and hold the slot during the body.

        Args:
            patience_s: longest wait for that, seconds; afterwards the body runs concurrently with clients' requests.

        Raises:
            BackgroundSlotEndedError: `end` cancelled the body.
            RuntimeError: the slot is taken.
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
        """Cancel the server's own request, if one runs: its engine is about to be changed."""
        if self.taken is not None and not self.taken.expired():
            self.taken.reschedule(asyncio.get_running_loop().time())

    async def _wait(self, patience_s: float) -> None:
        """Wait until admission is open and no request runs; after `patience_s`, only until admission is open."""
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
    """Wait until the event is set and is still set when the waiting task runs."""
    while not event.is_set():
        await event.wait()
