"""Loads and verifies the adapters of one engine, and keeps track of the loaded ones.

A version's files are compared with its manifest, loaded under a new name, and verified with its probes before a
request may use the adapter.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Protocol, TypeVar

from serving.model_names import SHOWN_CHARS, ModelNotFoundError
from serving.replicas.adapter_cache import AdapterCache, AdapterUse, Checked, LoadedAdapter
from serving.replicas.served_model import ServedModel
from serving.replicas.verification import Verification
from svc.engine.engine import Engine
from svc.errors import IntegrityError, NotFoundError, RefusedError
from svc.version import Format, Target, VersionId

log = logging.getLogger(__name__)

_MAX_READS = 4

Result = TypeVar("Result")


class _UnlessDead(Protocol):
    """See serving.replicas.engine_watch.EngineWatch.unless_dead."""

    async def __call__(self, work: Coroutine[Any, Any, Result]) -> Result: ...


class EngineAdapters:
    """The adapters of one engine, from its start to its stop.

    Args:
        model: the model that the engine was started with.
        unless_dead: runs a request to the engine, and fails if the engine dies.
        occupied: context manager that marks the engine as in use.
        patience_s, on_change: see AdapterCache.
    """

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        verification: Verification,
        unless_dead: _UnlessDead,
        occupied: Callable[[], AbstractContextManager[None]],
        *,
        patience_s: float,
        on_change: Callable[[float | None], None],
    ) -> None:
        self._engine = engine
        self._client = engine.client
        self._model = model
        self._verification = verification
        self._unless_dead = unless_dead
        self._occupied = occupied
        self._reads = asyncio.Semaphore(_MAX_READS)
        max_loaded = engine.capabilities.adapters
        self._cache = AdapterCache(self, max_loaded=max_loaded, patience_s=patience_s, on_change=on_change)

    @property
    def loaded(self) -> list[LoadedAdapter]:
        """Adapters that requests may use now."""
        return self._cache.loaded

    def has(self, version: VersionId) -> bool:
        """Return whether a version's adapter is loaded, or is being loaded."""
        return self._cache.has(version)

    def is_ready(self, version: VersionId, *, for_operator: bool) -> bool:
        """Return whether a version's adapter is loaded and accepts requests."""
        return self._cache.is_ready(version, for_operator=for_operator)

    def take(self, version: VersionId, *, for_operator: bool) -> AdapterUse | None:
        """Return a hold on an adapter that is ready; see AdapterCache.take."""
        return self._cache.take(version, for_operator=for_operator)

    async def bring(self, version: VersionId, *, for_operator: bool) -> AdapterUse:
        """Return a hold on an adapter, after loading the adapter if necessary; see AdapterCache.bring."""
        return await self._cache.bring(version, for_operator=for_operator)

    def use(self, version: VersionId, *, for_operator: bool = False) -> AbstractAsyncContextManager[LoadedAdapter]:
        """Hold a loaded adapter during the body; see AdapterCache.use."""
        return self._cache.use(version, for_operator=for_operator)

    def drop(self, version: VersionId) -> None:
        """Handle the removal of a version; see AdapterCache.drop."""
        self._cache.drop(version)

    def close(self) -> None:
        """Close the cache when the engine stops."""
        self._cache.close()

    async def check(self, version: VersionId) -> None:
        """Check that a client's request may load a version's adapter.

        Raises:
            ModelNotFoundError: it may not; the message, which clients see, has the reason and no paths.
        """
        if self.has(version):
            return
        try:
            async with self._reads:  # clients can request any number of versions, and these threads are shared
                adapter = await self._verification.adapter(version, self._model)
            if adapter.failed:
                raise RefusedError(
                    f"{version} failed a check at registration",
                    expected="a version that passed every check, or the one in production",
                )
        except RefusedError as error:
            raise ModelNotFoundError(error.wrong, expected=error.expected, todo=error.todo) from error
        except (NotFoundError, IntegrityError) as error:
            log.info("rejected a client's request for %s: %s", version, error.wrong)
            raise _no_adapter(version) from error

    async def load(self, version: VersionId, name: str) -> Checked:
        """Load an adapter and verify it.

        Raises:
            ModelNotFoundError: the version was removed meanwhile.
            SvcError: the load or the verification failed.
        """
        target = Target(version, Format.ADAPTER)
        try:
            adapter = await self._verification.adapter(version, self._model)
            await self._verification.files(target)
            with self._occupied():  # so that a swap waits for the load
                await self._unless_dead(self._client.load_adapter(name, adapter.folder))
                checked = await self._unless_dead(self._verification.adapter_probes(self._engine, name, target))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("could not load or verify the adapter of %s", version)
            if version not in await self._verification.registered(version.name):
                raise _no_adapter(version) from error
            raise
        log.info("loaded the adapter of %s as %s: %s", version, name, checked.found)
        return checked

    async def unload(self, name: str) -> None:
        await self._unless_dead(self._client.unload_adapter(name))

    async def unload_all(self) -> None:
        """Unload the adapters that an earlier server loaded, because their weights are unknown."""
        for name in await self._client.adapters():
            await self._client.unload_adapter(name)


def _no_adapter(version: VersionId) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"model {str(version)[:SHOWN_CHARS]!r} has no adapter that can be served here",
        expected="a registered version that was trained as an adapter",
    )
