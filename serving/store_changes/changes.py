"""Lets the tasks of a server wait for changes that other processes make in the store.

Without a listener (`serving.store_changes.change_listener`, `serving.store_changes.sqlite_listener`), every wait lasts
one poll interval.
"""

import asyncio
import math
import time
from contextlib import suppress

FALLBACK_POLL_S = 5.0
"""Seconds between two reads of the store while notifications of changes are known to work. If a notification is lost,
the change is noticed after at most this time."""


class Changes:
    """Counts the changes that this server was notified of, and lets tasks wait for the next change. All methods must be
    called on one event loop.

    A task saves `count` before it reads the store, and then passes the saved number to `wait`. A change during the read
    then ends the wait immediately, so that no change is missed.

    Attributes:
        count: number of notifications so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._next = asyncio.Event()  # replaced with every change
        self._notified_until = float("-inf")

    @property
    def notified(self) -> bool:
        """Whether notifications are known to arrive, so that the store need not be read often."""
        return time.monotonic() < self._notified_until

    async def wait(self, count: int, poll_s: float, *, within_s: float = math.inf) -> None:
        """Wait until a change has arrived since `count` was saved, or until the store must be read again.

        Args:
            poll_s: longest wait in seconds while notifications are unreliable. While they are known to arrive, the
                longest wait is the larger of this value and `FALLBACK_POLL_S`.
            within_s: longest wait in seconds in both cases, for work that is due at a certain time.
        """
        if self.count != count:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(min(within_s, max(poll_s, FALLBACK_POLL_S) if self.notified else poll_s)):
                await self._next.wait()

    def announce(self) -> None:
        """Record that something has changed in the store, and end all waits."""
        self.count += 1
        changed, self._next = self._next, asyncio.Event()
        changed.set()

    def trust(self, seconds: float) -> None:
        """Assume for the given time that notifications work. If this was not assumed before, end all waits, because
        earlier notifications may have been lost.
        """
        if not self.notified:
            self.announce()
        self._notified_until = time.monotonic() + seconds

    def distrust(self) -> None:
        """Assume that notifications no longer arrive. Tasks read the store now, and poll it frequently from now on."""
        if self.notified:
            self._notified_until = float("-inf")
            self.announce()
