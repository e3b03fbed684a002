"""Admission with an engine, and ways to wait for it."""

import asyncio

from serving.admission.admission import Admission


def open_admission(
    *, max_running: int = 8, max_tokens: int = 800, max_queued: int = 8, queue_timeout_s: float = 60.0
) -> Admission:
    """Takes requests at once."""
    admission = Admission(
        max_running=max_running, max_tokens=max_tokens, max_queued=max_queued, queue_timeout_s=queue_timeout_s
    )
    admission.available()
    return admission


async def drained(admission: Admission, timeout_s: float) -> None:
    """Until nothing runs, the server's own request among it."""
    async with asyncio.timeout(timeout_s):
        while admission.running or admission.background_slot.taken:
            await asyncio.sleep(0)


async def settle() -> None:
    """Until whoever can go on has done so."""
    for _ in range(8):
        await asyncio.sleep(0)


async def run_until(admission: Admission, end: asyncio.Event) -> None:
    """One request."""
    async with admission.admit():
        await end.wait()


async def admit_once(admission: Admission) -> None:
    """A request that ends at once."""
    async with admission.admit():
        pass
