"""Evicts adapters whose versions were removed from the registry.

Other processes remove versions without asking the server. Only versions that the store marks as needed are protected
from removal. A version is not marked merely because a client requested it by number and its adapter was loaded. When
a version is removed, running requests complete with its adapter; later requests fail because the version no longer
exists.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from serving.engines.pool import EnginePool
from svc.version import VersionId

log = logging.getLogger(__name__)

_POLL_S = 1.0


class RemovedAdapters:
    """Finds adapters of removed versions in one model's engines and evicts them.

    Args:
        registered: function that returns the registered versions of a model.
    """

    def __init__(self, pool: EnginePool, registered: Callable[[str], Awaitable[set[VersionId]]]) -> None:
        self._pool = pool
        self._registered = registered

    async def run(self) -> None:
        """Evict the adapters of removed versions at intervals, until cancelled."""
        while True:
            try:
                await self._check()
            except Exception:  # the boundary: loaded adapters keep serving, and are checked again
                log.exception("could not unload the adapters of removed versions; retrying")
            await asyncio.sleep(_POLL_S)

    async def _check(self) -> None:
        """Evict the adapters of removed versions, except for the production version, which keeps serving."""
        engines = [(engine, engine.adapters) for engine in self._pool.all if engine.adapters]
        loaded = [
            (adapters, each.version)
            for engine, adapters in engines
            for each in adapters.loaded
            if engine.target is not None and each.version != engine.target.version
        ]
        if not loaded:
            return
        registered = {name: await self._registered(name) for name in {version.name for _, version in loaded}}
        for adapters, version in loaded:
            if version not in registered[version.name]:
                log.info("%s was removed; unloading its adapter", version)
                adapters.drop(version)
