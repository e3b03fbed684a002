"""Loads and verifies the adapters of one engine. `serving.engines.adapter_cache` tracks which adapters are loaded.

Before a request may use an adapter, the adapter's files are compared with the version's manifest. The adapter is then
loaded under a new name and verified with the version's probes (texts with recorded log-probabilities).
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from serving.engines.adapter_cache import Checked
from serving.engines.engine_watch import EngineWatch
from serving.engines.model_names import SHOWN_CHARS, ModelNotFoundError
from serving.engines.served_model import ServedModel
from serving.engines.verification import Verification
from svc.engine.client import EngineClient
from svc.engine.engine import Engine
from svc.errors import IntegrityError, NotFoundError, RefusedError
from svc.version import Format, Target, VersionId

log = logging.getLogger(__name__)

_MAX_READS = 4


@dataclass(frozen=True, slots=True, eq=False)
class EngineAdapterLoader:
    """Loads adapters into one engine.

    Attributes:
        model: the model that the engine was started with.
        watch: object that makes a pending request to the engine fail if the engine dies.
        occupied: function that returns a context manager that marks the engine as in use.
    """

    engine: Engine
    model: ServedModel
    verification: Verification
    watch: EngineWatch
    occupied: Callable[[], AbstractContextManager[None]]
    _reads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MAX_READS), init=False)

    async def check(self, version: VersionId) -> None:
        """Check that a client's request may load a version's adapter.

        Raises:
            ModelNotFoundError: the request may not load the adapter. The message is shown to clients, so it gives the
                reason without any paths.
        """
        try:
            async with self._reads:  # clients can request any number of versions, and these threads are shared
                adapter = await self.verification.adapter(version, self.model)
            if adapter.failed:
                raise RefusedError(
                    f"{version} failed a check when it was registered",
                    expected="a version that passed every check, or the version in production",
                )
        except RefusedError as error:
            raise ModelNotFoundError(error.wrong, expected=error.expected, todo=error.todo) from error
        except (NotFoundError, IntegrityError) as error:
            log.info("rejected a client's request for %s: %s", version, error.wrong)
            raise _no_adapter(version) from error

    async def load(self, version: VersionId, name: str) -> Checked:
        """Load an adapter into the engine and verify it.

        Raises:
            ModelNotFoundError: the version has since been removed.
            SvcError: the load or the verification failed.
        """
        target = Target(version, Format.ADAPTER)
        try:
            adapter = await self.verification.adapter(version, self.model)
            await self.verification.files(target)
            with self.occupied():  # so that a swap waits for the load
                await self.watch.unless_dead(self.engine.client.load_adapter(name, adapter.folder))
                checked = await self.watch.unless_dead(self.verification.adapter_probes(self.engine, name, target))
        except Exception as error:
            log.exception("could not load or verify the adapter of %s", version)
            if version not in await self.verification.registered(version.name):
                raise _no_adapter(version) from error
            raise
        log.info("loaded the adapter of %s under the name %s; verification result: %s", version, name, checked.found)
        return checked

    async def unload(self, name: str) -> None:
        await self.watch.unless_dead(self.engine.client.unload_adapter(name))


async def unload_all(client: EngineClient) -> None:
    """Unload adapters that an earlier server loaded into an engine, because their weights cannot be trusted."""
    for name in await client.adapters():
        await client.unload_adapter(name)


def _no_adapter(version: VersionId) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"model {str(version)[:SHOWN_CHARS]!r} has no adapter that can be served here",
        expected="a registered version that was trained as an adapter",
    )
