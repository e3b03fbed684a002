"""Keeps one engine alive: starts it with a version, or adopts one that runs, has it verified, notices its death.

Decides nothing: what to load, and what to do after a death, is the reconciler's; who gets a request, the pool's.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from serving.replicas.adapter_cache import AdapterUse, Checked
from serving.replicas.engine_adapters import EngineAdapters
from serving.replicas.engine_watch import EngineWatch
from serving.replicas.served_model import ServedModel
from serving.replicas.verification import Verification
from svc.engine.client import EngineClient
from svc.engine.engine import LastingEngine
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.state import EnginePhase, EngineState
from svc.engine.vllm.connection_pool import EngineConnections
from svc.version import Format, Target, VersionId

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedWeights:
    """Weights that were loaded and verified, the same version's as before or another's; no two loads are equal.

    Attributes:
        fresh: a new engine loaded them; otherwise one that ran.
    """

    fresh: bool


NO_WEIGHTS = LoadedWeights(fresh=True)
"""Before the first."""


class Replica:
    """One engine, what it holds, and the requests that run in it.

    Args:
        replica: its number; the engine's folder and log are named after it.
        launch: makes an engine for a model, unstarted.
        on_change: hears each change of state.
        on_phase: hears what a start is doing.
        turn: held while it starts an engine, with others that would start at the same time.
        adapter_patience_s: longest wait of a request for a place for its adapter, seconds.
        silence_s: longest silence of the engine within a client's request, seconds.

    Attributes:
        target: what the engine was last verified to hold; None while nobody knows. Of adapters the one in production.
        checked: how that was verified.
        why: of its last death.
        lock: held by who starts, changes or ends it; see `EnginePool.held`.
        watch: notices the engine's death.
        asleep: the engine has freed its GPU.
        adapters: those that it applies beside its base; None where it holds a version itself.
        on_adapter: hears when an adapter has come, with the seconds that it took, or has gone, with None.
        reserved: requests for which an adapter is loaded here, or was, and that do not run yet.
    """

    def __init__(
        self,
        replica: int,
        launch: Callable[[ServedModel], LastingEngine],
        verification: Verification,
        on_change: Callable[["Replica"], None],
        on_phase: Callable[[EnginePhase], None] = lambda phase: None,
        *,
        turn: asyncio.Lock | None = None,
        adapter_patience_s: float = 60.0,
        silence_s: float = 600.0,
    ) -> None:
        self.replica = replica
        self._turn = turn or asyncio.Lock()
        self.lock = asyncio.Lock()
        self._launch = launch
        self._verification = verification
        self._on_change = on_change
        self._on_phase = on_phase
        self._engine: LastingEngine | None = None
        self._http: EngineConnections | None = None
        self._silence_s = silence_s
        self._running = self.reserved = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.state = EngineState.STOPPED
        self.weights = NO_WEIGHTS
        self.watch = EngineWatch(lambda: self._started)
        self.target: Target | None = None
        self.checked: Checked | None = None
        self.why = "it did not start"
        self.asleep = False
        self._adapter_patience_s = adapter_patience_s
        self._model: ServedModel | None = None
        self.adapters: EngineAdapters | None = None
        self.on_adapter: Callable[[float | None], None] = lambda seconds: None

    @property
    def client(self) -> EngineClient:
        """For what the server asks the engine itself.

        Raises:
            RuntimeError: none runs.
        """
        return self._started.client

    @property
    def http(self) -> EngineConnections:
        """For the requests of clients.

        Raises:
            RuntimeError: none runs.
        """
        if self._http is None:
            raise RuntimeError("no engine runs")
        return self._http

    @property
    def _started(self) -> LastingEngine:
        if self._engine is None:
            raise RuntimeError("no engine runs")
        return self._engine

    @property
    def capabilities(self) -> EngineCapabilities | None:
        """What the engine can do; None where there is none."""
        engine = self._engine
        return engine.capabilities if engine else None

    @property
    def model(self) -> ServedModel | None:
        """What the engine was started with; None before the first start."""
        return self._model

    @property
    def plan(self) -> list[dict[str, Any]] | None:
        """How the engine was started; None where none was."""
        engine = self._engine  # once: the status is made in another thread
        return engine.plan if engine else None

    @property
    def has_engine(self) -> bool:
        """Whether there is an engine; it may have died a moment ago."""
        return self._engine is not None

    @property
    def running(self) -> int:
        """What runs in it, the server's own request among it."""
        return self._running

    @property
    def unverified(self) -> set[VersionId]:
        """What it answers with and nothing has verified; of adapters also others than the one in production."""
        loaded = self.adapters.loaded if self.adapters else []
        found = {each.version for each in loaded if not each.checked.verified}
        return found | {self.target.version} if self.target and self.checked and not self.checked.verified else found

    def serves(self, wanted: VersionId | None) -> Target | None:
        """What a request for a version gets here; None where it cannot be asked here.

        Args:
            wanted: None for whichever it holds.
        """
        if self.target is None or wanted in (None, self.target.version):
            return self.target
        return Target(wanted, Format.ADAPTER) if wanted and self.target.format is Format.ADAPTER else None

    def lacks_adapter(self, version: VersionId) -> bool:
        """Whether the engine applies adapters and a request would have to wait for the version's."""
        adapters = self.adapters
        return adapters is not None and not adapters.is_ready(version, for_operator=self._in_production(version))

    def take_adapter(self, version: VersionId) -> AdapterUse | None:
        """Return the use of a version's adapter; None where a request has to wait for it, or the engine has none."""
        return self.adapters.take(version, for_operator=self._in_production(version)) if self.adapters else None

    async def bring_adapter(self, version: VersionId) -> AdapterUse:
        """Return the use of a version's adapter, loaded first where it must be.

        Raises:
            RuntimeError: the engine holds a version itself.
            QueueTimeoutError: all places for adapters were in use for too long.
            ModelNotFoundError: the engine cannot take it.
            SvcError: it could not be loaded, or is not what it should be.
        """
        if self.adapters is None:
            raise RuntimeError("the engine holds a version itself")
        return await self.adapters.bring(version, for_operator=self._in_production(version))

    def _in_production(self, version: VersionId) -> bool:
        return self.target is not None and self.target.version == version

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Something runs in the engine for the body."""
        self.occupy()
        try:
            yield
        finally:
            self.vacate()

    def occupy(self) -> None:
        """Something runs in the engine until `vacate`."""
        self._running += 1
        self._idle.clear()

    def vacate(self) -> None:
        """It runs no more."""
        self._running -= 1
        if not self._running:
            self._idle.set()

    async def drained(self, timeout_s: float) -> None:
        """Returns when nothing runs in it. Of use only while it takes nothing new.

        Raises:
            TimeoutError: something still runs after `timeout_s` seconds.
        """
        async with asyncio.timeout(timeout_s):
            await self._idle.wait()

    def enter(self, state: EngineState) -> None:
        """Shows a state to the pool, which decides who may enter."""
        if state is EngineState.READY and self.state is not EngineState.DRAINING:  # as where a swap was given up early
            self.weights = LoadedWeights(fresh=self.state is EngineState.STARTING)
        if state is EngineState.READY:
            self.watch.clear()
        self.state = state
        self._on_change(self)

    async def start(self, target: Target) -> str:
        """Starts an engine with a version, in place of the one before, and has it verified.

        Returns:
            What was found, for the journal.

        Raises:
            NotFoundError, IntegrityError: the version's files are not there or not right.
            EngineError: it did not start, or runs other weights (ProbeError).
        """
        try:
            await self.stop(EngineState.STARTING)
            engine = await self._launched(target)
            self._take(engine)
            self._make_adapters()
            async with self._turn:
                await self._start_checked(engine, target)
            found = await self.verify(target, fresh=True)
        except BaseException:
            await self.stop(EngineState.FAILED)
            raise
        self.enter(EngineState.READY)
        return found

    async def adopt(self, target: Target) -> bool:
        """Takes the engine that an earlier server left here, if it holds a version and the verification says so too.

        Returns:
            Whether it did. An engine that holds another version is left alone; one that fails is ended.
        """
        engine = await self._launched(target)
        if await engine.orphan_holds() != str(target):
            await engine.leave()
            return False
        self._take(engine)
        self.enter(EngineState.STARTING)
        try:
            await self._verification.files(target)
            await engine.adopt()
            await self._verify_again(target)
        except Exception:  # whatever is wrong with it, a new one may do better, or say what it is
            log.warning("the engine of an earlier server cannot be adopted", exc_info=True)
            await self.stop()
            return False
        except BaseException:
            await self.stop()
            raise
        log.info("replica %d: an engine that ran was adopted", self.replica)
        self.enter(EngineState.READY)
        return True

    async def _launched(self, target: Target) -> LastingEngine:
        """An unstarted engine; its folders are made."""
        self._model = await self._verification.model(target)
        return await asyncio.to_thread(self._launch, self._model)

    def _take(self, engine: LastingEngine) -> None:
        self._engine = engine
        self._http = EngineConnections(engine.socket, silence_s=self._silence_s)

    def _drop(self) -> None:
        if self._http is not None:
            self._http.close()
        self._engine = self._http = None

    def _make_adapters(self) -> None:
        """Room for adapters in a new engine, if it takes any; what another engine had is forgotten."""
        self._end_adapters()
        if self._model and self._started.capabilities.adapters:
            self.adapters = EngineAdapters(
                self._started,
                self._model,
                self._verification,
                self.watch.unless_dead,
                self.occupied,
                patience_s=self._adapter_patience_s,
                on_change=lambda seconds: self.on_adapter(seconds),
            )

    def _end_adapters(self) -> None:
        adapters, self.adapters = self.adapters, None
        if adapters is not None:
            adapters.close()

    async def clear(self) -> None:
        """From now on nobody knows what the engine holds; a later server would not adopt it.

        Raises:
            OSError: that cannot be written down.
        """
        await self._started.record(None)
        self.target = self.checked = None

    async def reload(self, folder: Path) -> None:
        """Loads other weights in place and forgets what the older ones computed; `clear` comes before, `verify` next.

        Raises:
            EngineError: the engine did not take them; it counts as dead.
        """
        await self.watch.unless_dead(self.client.reload_weights(folder))
        await self.watch.unless_dead(self.client.reset_prefix_cache())

    async def verify(self, target: Target, *, fresh: bool = False) -> str:
        """Checks by probes that the engine holds a version, and remembers it, also for a server that comes after.

        An engine that cannot be probed is believed to hold what it was started with.

        Args:
            fresh: it was started with the version's files.

        Returns:
            What was found, for the journal.

        Raises:
            ProbeError: it runs other weights, or an engine that ran before cannot be told to hold these.
        """
        if self.adapters is not None:
            async with self.adapters.use(target.version, for_operator=True) as loaded:
                checked = loaded.checked
        else:
            checked = await self.watch.unless_dead(self._verification.probes(self._started, target, fresh=fresh))
        self.target, self.checked = target, checked
        try:
            await self._started.record(str(target))
        except OSError:  # it serves all the same
            log.exception("replica %d: a later server cannot adopt it", self.replica)
        log.info("replica %d holds %s: %s", self.replica, target, checked.found)
        return checked.found

    async def _verify_again(self, target: Target) -> None:
        """The same of an engine that ran without us: of what adapters it has, nobody knows what they hold."""
        self._make_adapters()
        if self.adapters is not None:
            await self.watch.unless_dead(self.adapters.unload_all())
        await self.verify(target)

    async def sleep(self) -> None:
        """Has the engine free its GPU, and enters a state that admits nobody. A later server does not adopt it.

        Raises:
            SvcError, OSError: it does not sleep, and is to be ended.
        """
        await self.clear()
        self.enter(EngineState.IDLE)
        self._end_adapters()
        # vLLM measures free memory when it starts and when it sleeps, and fails where another engine changes it.
        async with self._turn:
            await self.watch.unless_dead(self._started.sleep())
        self.asleep = True

    async def wake(self, target: Target) -> None:
        """Has the engine take its GPU again, and verified to hold a version; one that fails is ended.

        Raises:
            SvcError: it did not wake, or holds other weights (ProbeError).
        """
        self.enter(EngineState.STARTING)
        try:
            async with self._turn:
                await self.watch.unless_dead(self._started.wake())
            self.asleep = False
            await self._verify_again(target)
        except BaseException:
            await self.stop(EngineState.IDLE)
            raise
        self.enter(EngineState.READY)

    async def bring(self, target: Target) -> str:
        """Puts another adapter of the same base into production here: loaded and verified first, beside requests.

        Returns:
            What was found, for the journal.

        Raises:
            SvcError: what it held stays.
        """
        found = await self.verify(target)
        self.weights = LoadedWeights(fresh=False)
        self.on_adapter(None)
        return found

    async def _start_checked(self, engine: LastingEngine, target: Target) -> None:
        """Compares the files' hashes while the engine starts; nobody is served before both are done."""
        starting = asyncio.create_task(engine.start(self._on_phase))
        try:
            await self._verification.files(target)
            await starting
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)

    async def stop(self, state: EngineState = EngineState.STOPPED) -> None:
        """Ends the engine, if there is one, and enters a state that admits nobody."""
        self.target = self.checked = None
        self.asleep = False
        self.enter(state)
        self._end_adapters()
        if self._engine is not None:
            # Forgotten only once it has ended: whoever is cancelled here leaves it to the next call.
            await self._engine.stop()
            self._drop()

    async def leave(self) -> None:
        """Lets the engine run without us: a server that starts later can adopt it."""
        self._end_adapters()
        if self._engine is not None:
            await self._engine.leave()
            self._drop()
