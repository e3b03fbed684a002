"""Creates an admission with an engine, and helpers that wait for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serving.admission.admission import Admission
from serving.admission.tenant import NO_KEY, Tenant


def open_admission(
    *, max_running: int = 8, max_tokens: int = 800, max_queued: int = 8, queue_timeout_s: float = 60.0
) -> Admission:
    """Return an admission that accepts requests immediately."""
    admission = Admission(
        max_running=max_running, max_tokens=max_tokens, max_queued=max_queued, queue_timeout_s=queue_timeout_s
    )
    admission.available()
    return admission


@asynccontextmanager
async def admitted(admission: Admission, tokens: int = 1, tenant: Tenant = NO_KEY) -> AsyncIterator[None]:
    """Hold a place in the engine while the context is active."""
    await admission.enter(tokens, tenant)
    try:
        yield
    finally:
        admission.leave(tokens, tenant)


async def drained(admission: Admission, timeout_s: float) -> None:
    """Wait until no request is running, including the server's own requests."""
    async with asyncio.timeout(timeout_s):
        while admission.running or admission.background_slot.taken:
            await asyncio.sleep(0)


async def settle() -> None:
    """Wait until all tasks that can proceed have done so."""
    for _ in range(8):
        await asyncio.sleep(0)


async def run_until(admission: Admission, end: asyncio.Event) -> None:
    """Run a single request until an event is set."""
    async with admitted(admission):
        await end.wait()


async def admit_once(admission: Admission) -> None:
    """Run a single request that ends immediately."""
    async with admitted(admission):
        pass
