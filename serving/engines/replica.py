"""Manages one engine: starts it or adopts a running one, verifies its weights, and detects its death.

The reconciler decides what to load and what to do when an engine dies, and the pool decides which engine
gets a request.

Before a request may use an adapter, the adapter's files are compared with the version's manifest. The adapter is then
loaded under a new name and verified with the version's probes (texts with recorded log-probabilities).
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from serving.engines.adapter_cache import AdapterCache, AdapterUse, Checked
from serving.engines.engine_watch import EngineWatch
from serving.engines.model_names import SHOWN_CHARS, ModelNotFoundError
from serving.engines.served_model import ServedModel
from serving.engines.verification import Verification
from svc.engine.client import EngineClient
from svc.engine.engine import Engine, LastingEngine
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.state import EnginePhase, EngineState
from svc.engine.vllm.connection_pool import EngineConnections
from svc.errors import IntegrityError, NotFoundError, RefusedError
from svc.version import Format, Target, VersionId

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
                await self.watch.while_alive(self.engine.client.load_adapter(name, adapter.folder))
                checked = await self.watch.while_alive(self.verification.adapter_probes(self.engine, name, target))
        except Exception as error:
            log.exception("could not load or verify the adapter of %s", version)
            if version not in await self.verification.registered(version.name):
                raise _no_adapter(version) from error
            raise
        log.info("loaded the adapter of %s under the name %s; verification result: %s", version, name, checked.found)
        return checked

    async def unload(self, name: str) -> None:
        await self.watch.while_alive(self.engine.client.unload_adapter(name))


async def unload_all(client: EngineClient) -> None:
    """Unload adapters that an earlier server loaded into an engine, because their weights cannot be trusted."""
    for name in await client.adapters():
        await client.unload_adapter(name)


def _no_adapter(version: VersionId) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"model {str(version)[:SHOWN_CHARS]!r} has no adapter that can be served here",
        expected="a registered version that was trained as an adapter",
    )


log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedWeights:
    """Identity of the weights from a single load. Two loads never compare equal, even if they load the same version.

    Attributes:
        fresh: whether the weights were loaded by a new engine, rather than by an engine that was already running.
    """

    fresh: bool


NO_WEIGHTS = LoadedWeights(fresh=True)
"""Stands for the weights of a replica that has not loaded any yet."""


@dataclass(eq=False)
class Replica:
    """One engine slot of a model, with its current engine (if any), the engine's version and its running requests.

    Attributes:
        replica: the engine's number, which names its folder and log.
        launch: function that returns a new engine for a model, without starting it.
        on_change: function called on each state change.
        on_phase: function called with each phase of engine startup.
        turn: lock held while an engine starts, shared with other engines on the device.
        adapter_patience_s: longest time that a request may wait for an adapter slot, in seconds.
        silence_s: longest time that the engine may go without sending data during a client's request, in seconds.
        target: version that the engine was last verified to run, or None if unknown. If the engine applies
            adapters, this is the version in production.
        checked: result of the last verification.
        why: reason why the engine last died.
        lock: held while the engine is started, changed or stopped; see `EnginePool.held`.
        watch: watch that detects the engine's death.
        asleep: whether the engine has released its GPU memory.
        adapters: adapters that the engine applies to its base, or None if the engine runs a merged version.
        on_adapter: function called after an adapter load with its duration in seconds, and after an eviction
            with None.
        model: model that the engine was started with, or None if no engine has been started yet.
        running: number of running requests, including the server's own.
        reserved: number of requests that are not running yet but for which the engine has loaded or is
            loading an adapter.
    """

    replica: int
    launch: Callable[[ServedModel], LastingEngine]
    verification: Verification
    on_change: Callable[["Replica"], None]
    on_phase: Callable[[EnginePhase], None] = lambda phase: None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    adapter_patience_s: float = 60.0
    silence_s: float = 600.0

    def __post_init__(self) -> None:
        self.lock = asyncio.Lock()
        self._engine: LastingEngine | None = None
        self._http: EngineConnections | None = None
        self.running = self.reserved = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.state = EngineState.STOPPED
        self.weights = NO_WEIGHTS
        self.watch = EngineWatch(lambda: self._started)
        self.target: Target | None = None
        self.checked: Checked | None = None
        self.why = "the engine did not start"
        self.asleep = False
        self.model: ServedModel | None = None
        self.adapters: AdapterCache | None = None
        self.on_adapter: Callable[[float | None], None] = lambda seconds: None

    @property
    def client(self) -> EngineClient:
        """Client for the server's own requests to the engine.

        Raises:
            RuntimeError: no engine is running.
        """
        return self._started.client

    @property
    def http(self) -> EngineConnections:
        """Connections over which clients' requests are forwarded to the engine.

        Raises:
            RuntimeError: no engine is running.
        """
        if self._http is None:  # the address is known once the engine runs
            self._http = EngineConnections(self._started.address, silence_s=self.silence_s)
        return self._http

    @property
    def _started(self) -> LastingEngine:
        if self._engine is None:
            raise RuntimeError("no engine runs")
        return self._engine

    @property
    def capabilities(self) -> EngineCapabilities | None:
        """Capabilities of the engine, or None if there is no engine."""
        engine = self._engine
        return engine.capabilities if engine else None

    @property
    def plan(self) -> list[dict[str, Any]] | None:
        """Options that the engine was launched with, or None if no engine is running."""
        engine = self._engine  # read once: the status is built in another thread
        return engine.plan if engine else None

    @property
    def has_engine(self) -> bool:
        """Whether the replica has an engine. An engine that has only just died still counts."""
        return self._engine is not None

    @property
    def unverified(self) -> set[VersionId]:
        """Versions that this engine serves, directly or as loaded adapters, although they could not be verified."""
        loaded = self.adapters.loaded if self.adapters else []
        versions = {each.version for each in loaded if not each.checked.verified}
        if self.target and self.checked and not self.checked.verified:
            versions.add(self.target.version)
        return versions

    def serves(self, wanted: VersionId | None) -> Target | None:
        """Return the target (version and format) that this engine would use to serve a version, or None if it cannot
        serve that version.

        Args:
            wanted: the version, or None for the version that the engine runs.
        """
        if self.target is None or wanted in (None, self.target.version):
            return self.target
        return Target(wanted, Format.ADAPTER) if wanted and self.target.format is Format.ADAPTER else None

    async def applies(self, version: VersionId) -> bool:
        """Return whether a version can be applied as an adapter to the model that this engine was started with."""
        if self.model is None:
            return False
        try:
            await self.verification.adapter(version, self.model)
        except (NotFoundError, RefusedError, IntegrityError):
            return False
        return True

    def lacks_adapter(self, version: VersionId) -> bool:
        """Return whether a request would have to wait for the version's adapter in this engine.

        Returns False if the engine does not apply adapters.
        """
        adapters = self.adapters
        return adapters is not None and not adapters.is_ready(version, for_operator=self._in_production(version))

    def take_adapter(self, version: VersionId) -> AdapterUse | None:
        """Return a claim on a version's adapter, if the adapter is ready.

        Returns None if it is not ready, or if the engine does not apply adapters.
        """
        return self.adapters.take(version, for_operator=self._in_production(version)) if self.adapters else None

    async def acquire_adapter(self, version: VersionId) -> AdapterUse:
        """Return a claim on a version's adapter, loading the adapter first if necessary.

        Raises:
            RuntimeError: the engine runs a merged version and does not apply adapters.
            QueueTimeoutError: all slots for adapters were in use for too long.
            ModelNotFoundError: the engine cannot apply the adapter.
            SvcError: the adapter could not be loaded, or failed its probes.
        """
        if self.adapters is None:
            raise RuntimeError("the engine does not support adapters")
        return await self.adapters.acquire(version, for_operator=self._in_production(version))

    def _in_production(self, version: VersionId) -> bool:
        return self.target is not None and self.target.version == version

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Context manager that marks the engine as in use."""
        self.occupy()
        try:
            yield
        finally:
            self.release()

    def occupy(self) -> None:
        """Count a request as running until `release` is called."""
        self.running += 1
        self._idle.clear()

    def release(self) -> None:
        """Stop counting a request as running."""
        self.running -= 1
        if not self.running:
            self._idle.set()

    async def drained(self, timeout_s: float) -> None:
        """Wait until no requests are running. This is useful only while the engine accepts no new requests.

        Raises:
            TimeoutError: a request is still running after `timeout_s` seconds.
        """
        async with asyncio.timeout(timeout_s):
            await self._idle.wait()

    def enter(self, state: EngineState) -> None:
        """Set the engine's state and notify the pool, which routes requests based on that state."""
        if state is EngineState.READY and self.state is not EngineState.DRAINING:  # else a swap was cancelled early
            self.weights = LoadedWeights(fresh=self.state is EngineState.STARTING)
        if state is EngineState.READY:
            self.watch.clear()
        self.state = state
        self.on_change(self)

    async def start(self, target: Target) -> str:
        """Start a new engine that runs the given version, and verify its weights. A previous engine is stopped first.

        Returns:
            The result of the verification, for the journal.

        Raises:
            NotFoundError, IntegrityError: the version's files are missing or damaged.
            EngineError: the engine did not start, or runs different weights (ProbeError).
        """
        try:
            await self.stop(EngineState.STARTING)
            engine = await self._launched(target)
            self._take(engine)
            self._make_adapters()
            async with self.turn:
                await self._start_checked(engine, target)
            result = await self.verify(target, fresh=True)
        except BaseException:
            await self.stop(EngineState.FAILED)
            raise
        self.enter(EngineState.READY)
        return result

    async def adopt(self, target: Target) -> bool:
        """Adopt an engine that an earlier server left running, if it runs the given version and passes verification.

        Returns:
            Whether the engine was adopted. If not, it either runs another version and was left alone, or it failed
            verification and was stopped.
        """
        engine = await self._launched(target)
        if await engine.orphan_holds() != str(target):
            await engine.leave()
            return False
        self._take(engine)
        self.enter(EngineState.STARTING)
        try:
            await self.verification.files(target)
            await engine.adopt()
            await self._verify_again(target)
        except Exception:  # a new engine may work, or may show the error
            log.warning("could not adopt the engine of an earlier server", exc_info=True)
            await self.stop()
            return False
        except BaseException:
            await self.stop()
            raise
        log.info("replica %d: adopted a running engine", self.replica)
        self.enter(EngineState.READY)
        return True

    async def _launched(self, target: Target) -> LastingEngine:
        """Create the engine's folders, and return the engine, which is not started yet."""
        self.model = await self.verification.model(target)
        return await asyncio.to_thread(self.launch, self.model)

    def _take(self, engine: LastingEngine) -> None:
        self._engine = engine

    def _drop(self) -> None:
        if self._http is not None:
            self._http.close()
        self._engine = self._http = None

    def _make_adapters(self) -> None:
        """Discard the previous engine's adapter cache, and create one for the new engine if it can load adapters."""
        self._end_adapters()
        engine = self._started
        if self.model and engine.capabilities.adapters:
            self.adapters = AdapterCache(
                EngineAdapterLoader(engine, self.model, self.verification, self.watch, self.occupied),
                max_loaded=engine.capabilities.adapters,
                patience_s=self.adapter_patience_s,
                on_change=lambda seconds: self.on_adapter(seconds),
            )

    def _end_adapters(self) -> None:
        adapters, self.adapters = self.adapters, None
        if adapters is not None:
            adapters.close()

    async def clear(self) -> None:
        """Record the engine's version as unknown, so that a server that starts later does not adopt the engine.

        Raises:
            OSError: the record cannot be written.
        """
        await self._started.record(None)
        self.target = self.checked = None

    async def fetch(self, target: Target) -> None:
        """Copy a version's files to the engine's machine if that is not this machine. Call this before `reload`.

        Raises:
            SvcError: the files could not be copied.
        """
        await self.watch.while_alive(self._started.fetch(await self.verification.folder(target)))

    async def reload(self, folder: Path) -> None:
        """Replace the engine's weights in place and reset its prefix cache.

        Call `clear` first and `verify` afterwards.

        Raises:
            EngineError: the reload failed. The engine is then considered dead.
        """
        await self.watch.while_alive(self.client.reload_weights(folder))
        await self.watch.while_alive(self.client.reset_prefix_cache())

    async def verify(self, target: Target, *, fresh: bool = False) -> str:
        """Use probes to check that the engine runs a version, and record the result for servers that start later.

        An engine that cannot be probed is assumed to run the version it was started with.

        Args:
            fresh: whether the engine was newly started with the version's files.

        Returns:
            The result of the verification, for the journal.

        Raises:
            ProbeError: the engine runs different weights, or was already running and cannot be verified.
        """
        if self.adapters is not None:
            async with self.adapters.use(target.version, for_operator=True) as loaded:
                checked = loaded.checked
        else:
            checked = await self.watch.while_alive(self.verification.probes(self._started, target, fresh=fresh))
        self.target, self.checked = target, checked
        try:
            await self._started.record(str(target))
        except OSError:  # the engine can serve nevertheless
            log.exception(
                "could not record the version that replica %d runs; "
                "after a restart, the server will not adopt this engine",
                self.replica,
            )
        log.info("replica %d now runs %s: %s", self.replica, target, checked.found)
        return checked.found

    async def _verify_again(self, target: Target) -> None:
        """Verify an engine that an earlier server left running.

        Its adapters are unloaded first, because their weights are unknown.
        """
        self._make_adapters()
        if self.adapters is not None:
            await self.watch.while_alive(unload_all(self.client))
        await self.verify(target)

    async def sleep(self) -> None:
        """Put the engine to sleep: it releases its GPU memory and stops accepting requests.

        A server that starts later does not adopt a sleeping engine.

        Raises:
            SvcError, OSError: the engine could not be put to sleep and must be stopped.
        """
        await self.clear()
        self.enter(EngineState.IDLE)
        self._end_adapters()
        # vLLM measures free memory when it starts and when it sleeps, and fails if another engine changes it meanwhile.
        async with self.turn:
            await self.watch.while_alive(self._started.sleep())
        self.asleep = True

    async def wake(self, target: Target) -> None:
        """Wake a sleeping engine and verify its version. When the engine wakes up, it allocates its GPU memory again.

        If the engine does not wake up or fails verification, it is stopped.

        Raises:
            SvcError: the engine did not wake up, or runs different weights (ProbeError).
        """
        self.enter(EngineState.STARTING)
        try:
            async with self.turn:
                await self.watch.while_alive(self._started.wake())
            self.asleep = False
            await self._verify_again(target)
        except BaseException:
            await self.stop(EngineState.IDLE)
            raise
        self.enter(EngineState.READY)

    async def switch_adapter(self, target: Target) -> str:
        """Switch production to another adapter of the same base.

        The adapter is loaded and verified while requests run.

        Returns:
            The result of the verification, for the journal.

        Raises:
            SvcError: the load or the verification failed. The previous adapter stays in production.
        """
        result = await self.verify(target)
        self.weights = LoadedWeights(fresh=False)
        self.on_adapter(None)
        return result

    async def _start_checked(self, engine: LastingEngine, target: Target) -> None:
        """Verify the file hashes while the engine starts. No requests are served before both have completed."""
        starting = asyncio.create_task(engine.start(self.on_phase))
        try:
            await self.verification.files(target)
            await starting
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)

    async def stop(self, state: EngineState = EngineState.STOPPED) -> None:
        """Stop the engine, if there is one, and enter the given state, in which no requests are routed to it."""
        self.target = self.checked = None
        self.asleep = False
        self.enter(state)
        self._end_adapters()
        if self._engine is not None:
            # Dropped only after it has stopped: if this call is cancelled, the next one stops it.
            await self._engine.stop()
            self._drop()

    async def leave(self) -> None:
        """Detach from the engine and leave it running, so that a server that starts later can adopt it."""
        self._end_adapters()
        if self._engine is not None:
            await self._engine.leave()
            self._drop()
