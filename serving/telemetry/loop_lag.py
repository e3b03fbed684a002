"""How late the event loop is: what every request and every stream waits for beside its own work."""

import asyncio
from collections.abc import Callable

_EVERY_S = 0.1
"""Three thousand looks in five minutes, enough for a 99th percentile; five times as many cost a hundredth of a core."""


async def watch_loop_lag(observe: Callable[[float], None], every_s: float = _EVERY_S) -> None:
    """Sleep again and again until cancelled.

    Args:
        observe: hears how much later than asked the task woke up, seconds; less than 1 ms is the clock's own.
        every_s: from one waking to the next, seconds.
    """
    now = asyncio.get_running_loop().time
    while True:
        due = now() + every_s
        await asyncio.sleep(every_s)
        observe(max(0.0, now() - due))
