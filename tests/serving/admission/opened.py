"""Admission with an engine, and ways to wait for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serving.admission.admission import Admission
from serving.admission.party import NO_KEY, Party


def open_admission(
    *, max_running: int = 8, max_tokens: int = 800, max_queued: int = 8, queue_timeout_s: float = 60.0
) -> Admission:
    """Takes requests at once."""
    admission = Admission(
        max_running=max_running, max_tokens=max_tokens, max_queued=max_queued, queue_timeout_s=queue_timeout_s
    )
    admission.available()
    return admission


@asynccontextmanager
async def admitted(admission: Admission, tokens: int = 1, party: Party = NO_KEY) -> AsyncIterator[None]:
    """Hold a place in the engine for the body."""
    await admission.enter(tokens, party)
    try:
        yield
    finally:
        admission.leave(tokens)


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
    async with admitted(admission):
        await end.wait()


async def admit_once(admission: Admission) -> None:
    """A request that ends at once."""
    async with admitted(admission):
        pass
