"""Starts an engine next to the ones that serve, for a blue-green swap or for the candidate of a rollout."""

import asyncio

from serving.replicas.pool import EnginePool
from serving.replicas.replica import Replica
from serving.rollout.cancellation import Cancellation, SupersededError
from svc.version import Target


async def start_second_engine(pool: EnginePool, target: Target, cancellation: Cancellation) -> tuple[Replica, str]:
    """Start and verify an engine that is not a member of the pool; check before that there is memory for it.

    Returns:
        The engine, and the result of its verification. An engine that failed, or whose start was cancelled, is stopped
        in the background.

    Raises:
        SupersededError: cancellation was requested.
        SvcError, OSError: the engine did not start, or holds other weights (ProbeError).
    """
    engine = pool.add()
    starting = asyncio.create_task(engine.start(target))
    try:
        result = await cancellation.outcome_of(starting)
        cancellation.check()
    except (SupersededError, asyncio.CancelledError):
        pool.retirement.after_start(engine, starting)
        raise
    except Exception:
        pool.retirement.after_requests(engine)
        raise
    return engine, result
