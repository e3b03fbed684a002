"""Starts an engine alongside the serving engines, for a blue-green swap or a rollout's candidate."""

import asyncio

from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.rollout.cancellation import Cancellation, SupersededError
from svc.version import Target


async def start_second_engine(pool: EnginePool, target: Target, cancellation: Cancellation) -> tuple[Replica, str]:
    """Start and verify an engine that is not a pool member, after checking that there is enough memory for it. If this
    fails or is cancelled, the engine is stopped in the background.

    Returns:
        The engine and the result of its verification.

    Raises:
        SupersededError: cancellation was requested.
        SvcError, OSError: the engine did not start, or runs different weights (ProbeError).
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
