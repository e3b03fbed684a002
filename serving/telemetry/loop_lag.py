"""Measures the lag of the event loop, which delays every request and stream."""

import asyncio
from collections.abc import Callable

_EVERY_S = 0.1
"""Seconds between measurements. This gives 3,000 samples in five minutes, which is enough for a 99th
percentile. Five times as many measurements would use 1% of a core."""


async def watch_loop_lag(observe: Callable[[float], None], every_s: float = _EVERY_S) -> None:
    """Measure the event loop's lag periodically until cancelled.

    Args:
        observe: function called with the delay of the task's wake-up, in seconds. Delays below 1 ms are within
            the clock's resolution.
        every_s: interval between two measurements, in seconds.
    """
    now = asyncio.get_running_loop().time
    while True:
        due = now() + every_s
        await asyncio.sleep(every_s)
        observe(max(0.0, now() - due))
