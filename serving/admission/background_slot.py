"""A place for the server's own request, beside those of clients, behind every one of them.

It is none of the requests that are counted, and none waits for it. It is given while admission is open and there is an
engine; when that ends, it is cut off: a swap does not wait for its answer, which could take longer than the swap may.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class BackgroundSlotEndedError(Exception):
    """The server's own request was cut off, for a swap or because the engine is gone; it may be asked again."""


class BackgroundSlot:
    """One place; requests of the server's own come one at a time."""

    def __init__(self) -> None:
        self._open, self._quiet = asyncio.Event(), asyncio.Event()
        self._taken: asyncio.Timeout | None = None

    @property
    def taken(self) -> bool:
        """Whether a request of the server's own has it."""
        return self._taken is not None

    def show(self, *, open: bool, running: int) -> None:
        """From now on admission is open or not, and so many requests run."""
        quiet = open and not running
        if open is not self._open.is_set() or quiet is not self._quiet.is_set():  # every request tells it anew
            _set(self._open, open)
            _set(self._quiet, quiet)

    @asynccontextmanager
    async def take(self, patience_s: float) -> AsyncIterator[None]:
        """Waits for a moment without requests, and holds the place for the body.

        Args:
            patience_s: after so long without such a moment it goes beside the requests that run.

        Raises:
            BackgroundSlotEndedError: the body was cut off.
            RuntimeError: somebody has the place.
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
        """Cuts the server's own request off, if one runs: its engine is about to be changed."""
        if self._taken is not None and not self._taken.expired():
            self._taken.reschedule(asyncio.get_running_loop().time())

    async def _wait(self, patience_s: float) -> None:
        """Returns when admission is open and no request runs, or after `patience_s` when it is open."""
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
