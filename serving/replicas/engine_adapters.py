"""The adapters beside the base of one engine: how each comes into it, and which are loaded.

The files of a version are compared with its manifest, loaded under a new name, and held against its probes before a
request may use them.
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

_MOST_READS = 4

Result = TypeVar("Result")


class _UnlessDead(Protocol):
    """See serving.replicas.engine_watch.EngineWatch.unless_dead."""

    async def __call__(self, work: Coroutine[Any, Any, Result]) -> Result: ...


class EngineAdapters:
    """What one engine applies, from its start to its end.

    Args:
        model: what the engine was started with.
        unless_dead: ends what is asked of an engine that died.
        occupied: for the body something runs in the engine.
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
        self._reads = asyncio.Semaphore(_MOST_READS)
        most = engine.capabilities.adapters
        self._cache = AdapterCache(self, max_loaded=most, patience_s=patience_s, on_change=on_change)

    @property
    def loaded(self) -> list[LoadedAdapter]:
        """Those that requests may use now."""
        return self._cache.loaded

    def has(self, version: VersionId) -> bool:
        """Whether one is loaded, or is being loaded."""
        return self._cache.has(version)

    def is_ready(self, version: VersionId, *, for_operator: bool) -> bool:
        """Whether one is loaded and takes requests."""
        return self._cache.is_ready(version, for_operator=for_operator)

    def take(self, version: VersionId, *, for_operator: bool) -> AdapterUse | None:
        """Return the use of one that is ready; see AdapterCache.take."""
        return self._cache.take(version, for_operator=for_operator)

    async def bring(self, version: VersionId, *, for_operator: bool) -> AdapterUse:
        """Return the use of one, loaded first where it must be; see AdapterCache.bring."""
        return await self._cache.bring(version, for_operator=for_operator)

    def use(self, version: VersionId, *, for_operator: bool = False) -> AbstractAsyncContextManager[LoadedAdapter]:
        """One for the body; see AdapterCache.use."""
        return self._cache.use(version, for_operator=for_operator)

    def drop(self, version: VersionId) -> None:
        """A version was removed; see AdapterCache.drop."""
        self._cache.drop(version)

    def close(self) -> None:
        """The engine ends."""
        self._cache.close()

    async def check(self, version: VersionId) -> None:
        """Raises where there is nothing that a client may have loaded.

        Raises:
            ModelNotFoundError: for clients: says why, without paths.
        """
        if self.has(version):
            return
        try:
            async with self._reads:  # clients can ask for as many as they like, and others use these threads too
                adapter = await self._verification.adapter(version, self._model)
            if adapter.failed:
                raise RefusedError(
                    f"{version} failed a check when it was registered",
                    expected="a version that passed every check, or the one in production",
                )
        except RefusedError as error:
            raise ModelNotFoundError(error.wrong, expected=error.expected, todo=error.todo) from error
        except (NotFoundError, IntegrityError) as error:
            log.info("%s was asked for: %s", version, error.wrong)
            raise _no_adapter(version) from error

    async def load(self, version: VersionId, name: str) -> Checked:
        """Loads one and verifies it.

        Raises:
            ModelNotFoundError: the version was removed meanwhile.
            SvcError: which of both failed, and why.
        """
        target = Target(version, Format.ADAPTER)
        try:
            adapter = await self._verification.adapter(version, self._model)
            await self._verification.files(target)
            with self._occupied():  # a swap drains the engine first
                await self._unless_dead(self._client.load_adapter(name, adapter.folder))
                checked = await self._unless_dead(self._verification.adapter_probes(self._engine, name, target))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("the adapter of %s cannot be used", version)
            if version not in await self._verification.registered(version.name):
                raise _no_adapter(version) from error
            raise
        log.info("the adapter of %s is loaded as %s: %s", version, name, checked.found)
        return checked

    async def unload(self, name: str) -> None:
        """Removes one."""
        await self._unless_dead(self._client.unload_adapter(name))

    async def unload_all(self) -> None:
        """Removes those that an earlier server left: nobody knows what they hold."""
        for name in await self._client.adapters():
            await self._client.unload_adapter(name)


def _no_adapter(version: VersionId) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"model {str(version)[:SHOWN_CHARS]!r} has no adapter that can be served here",
        expected="a registered version that was trained as one",
    )
