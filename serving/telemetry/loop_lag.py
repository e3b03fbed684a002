"""How late the event loop is: what every request and every stream waits for beside its own work."""

import asyncio
from collections.abc import Callable

_EVERY_S = 0.1
"""Three thousand looks in five minutes, enough for a 99th percentile; five times as many cost a hundredth of a core."""


class LoopLag:
    """Asks to be woken up again and again, and tells how much later than asked it was.

    Args:
        observe: hears how late, seconds; less than 1 ms is the clock's own.
        every_s: from one waking to the next, seconds.
    """

    def __init__(self, observe: Callable[[float], None], *, every_s: float = _EVERY_S) -> None:
        self._observe = observe
        self._every_s = every_s

    async def run(self) -> None:
        """Runs until it is cancelled."""
        now = asyncio.get_running_loop().time
        while True:
            due = now() + self._every_s
            await asyncio.sleep(self._every_s)
            self._observe(max(0.0, now() - due))
