"""Takes the adapters of versions that were removed from the registry out of the engines that have them loaded.

A version is removed by another process, which asks no server: nobody needs it who has not said so in the store. What a
request loaded by its number is such a version. Requests that use it end as they began; the next one is told that it is
gone.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from serving.replicas.pool import EnginePool
from svc.version import VersionId

log = logging.getLogger(__name__)

_POLL_S = 1.0


class RemovedAdapters:
    """Looks for them, for the engines of one model.

    Args:
        registered: the versions of the model that there are.
    """

    def __init__(self, pool: EnginePool, registered: Callable[[], Awaitable[set[VersionId]]]) -> None:
        self._pool = pool
        self._registered = registered

    async def run(self) -> None:
        """Runs until it is cancelled."""
        while True:
            try:
                await self._look()
            except Exception:  # the boundary: what is loaded serves on, and is looked at again
                log.exception("it cannot be seen which versions were removed")
            await asyncio.sleep(_POLL_S)

    async def _look(self) -> None:
        """The version in production stays loaded whatever became of its files, as it would without adapters."""
        engines = [(engine, engine.adapters) for engine in self._pool.all if engine.adapters]
        loaded = [
            (adapters, each.version)
            for engine, adapters in engines
            for each in adapters.loaded
            if engine.target is not None and each.version != engine.target.version
        ]
        if not loaded:
            return
        registered = await self._registered()
        for adapters, version in loaded:
            if version not in registered:
                log.info("%s was removed: its adapter goes", version)
                adapters.drop(version)
