"""Which engine of a pool takes a request, and what it calls the version that is asked for.

Knows neither HTTP nor how engines come and go.
"""

from collections.abc import Callable
from operator import methodcaller
from types import TracebackType
from typing import NamedTuple

from serving.admission.errors import ENGINE_RETRY_S, AdmissionError, EngineUnavailableError
from serving.model_names import ModelNames, ModelNotFoundError
from serving.replicas.adapter_cache import AdapterUse
from serving.replicas.engine_adapters import EngineAdapters
from serving.replicas.pool import EnginePool
from serving.replicas.replica import Replica
from serving.replicas.token_pace import TokenPace
from serving.replicas.transport import EngineDiedError
from svc.engine.client import DOWN
from svc.engine.vllm.connection_pool import EngineConnections
from svc.errors import EngineError
from svc.version import Format, Target


class AdapterFailedError(EngineError):
    """A version's adapter could not be loaded, or is not what it should be; the next request tries again."""

    retry_after_s = ENGINE_RETRY_S


class Lease(NamedTuple):
    """An engine for one request.

    Attributes:
        http: connections to the engine.
        served: the version that answers.
        engine_model: what the engine calls it.
        pace: how fast the engines of the model generate.
        show: puts the version's name in place of the engine's own name of an adapter, in a complete event or body;
            None where the engine has no name of its own.
    """

    http: EngineConnections
    served: Target
    engine_model: str
    pace: TokenPace
    show: Callable[[bytes], bytes] | None = None


class Balancer:
    """Spreads requests over the engines that are ready."""

    def __init__(self, pool: EnginePool, names: ModelNames) -> None:
        self._pool = pool
        self._names = names
        self.pace = TokenPace()

    async def check(self, model: str) -> None:
        """Raises where a name means nothing, also where only the registry knows that.

        Raises:
            ModelNotFoundError: nothing answers to it.
            EngineUnavailableError: nothing is loaded yet.
        """
        wanted = self._names.resolve(model)
        if wanted is None:
            return
        ready = self._pool.ready
        if any(engine.target and engine.target.version == wanted for engine in ready):
            return
        adapters = [engine.adapters for engine in ready if engine.adapters]
        if adapters and not any(each.has(wanted) for each in adapters):
            await adapters[0].check(wanted)

    def lease(self, model: str, *, without: Lease | None = None) -> "Leasing":
        """An engine for a request, the one in which the fewest run, for the body; its adapter is loaded first.

        Of engines that apply adapters one is preferred that has the version's.

        Args:
            model: a client's name for what it wants.
            without: another one than this.

        Entering raises:
            ModelNotFoundError: nothing answers to it.
            EngineUnavailableError: no engine takes requests now.
            QueueTimeoutError: all places for adapters were in use for too long.
            AdapterFailedError: the version's adapter could not be loaded, or is not what it should be.
        """
        return Leasing(self, model, without)

    def lacks_adapter(self, model: str) -> bool:
        """Return whether a request would have to wait for an adapter in the engine that would take it now.

        False where no engine takes requests: an engine that sleeps is woken by a request that waits for admission.

        Raises:
            ModelNotFoundError: nothing answers to the name.
        """
        served = self._names.served
        if served is None or served.format is not Format.ADAPTER:
            return False
        try:
            engine, served = self.choose(model)
        except EngineUnavailableError:
            return False
        return engine.lacks_adapter(served.version)

    def choose(self, model: str, without: Lease | None = None, kept: "_Kept | None" = None) -> tuple[Replica, Target]:
        """An engine, and what it answers with.

        Args:
            kept: its engine is chosen, where that still has the adapter and the request still wants it.

        Raises:
            ModelNotFoundError, EngineUnavailableError: as `lease` says.
        """
        wanted, found = self._names.resolve(model), list[tuple[Replica, Target]]()
        for engine in self._pool.ready:
            if not engine.watch.suspected and (without is None or engine.http is not without.http):
                served = engine.serves(wanted)
                if served is not None:
                    found.append((engine, served))
        if not found:
            raise EngineUnavailableError("no engine takes requests now", todo="send the request again later")
        if len(found) == 1:
            return found[0]
        if kept is not None and (same := next((pair for pair in found if kept.fits(*pair)), None)):
            return same
        return min(found, key=lambda pair: (_lacks_adapter(*pair), pair[0].running + pair[0].reserved))


class _Kept(NamedTuple):
    """An adapter that is loaded for a request which has no place in its engine yet.

    Attributes:
        adapters: of the engine; another object once it was started again.
    """

    engine: Replica
    adapters: EngineAdapters
    use: AdapterUse

    def fits(self, engine: Replica, served: Target) -> bool:
        """Whether an engine that would answer with a version has this adapter of it."""
        return engine is self.engine and engine.adapters is self.adapters and served.version == self.use.adapter.version


class Leasing:
    """A lease for the body of an `async with`. A class, since a generator costs several times as much.

    Entering waits for the adapter. Where a request may not wait, `enter` takes what is there; `bring` is the wait.
    """

    __slots__ = ("_balancer", "_engine", "_kept", "_model", "_use", "_without")

    def __init__(self, balancer: Balancer, model: str, without: Lease | None) -> None:
        self._balancer = balancer
        self._model = model
        self._without = without
        self._engine: Replica
        self._kept: _Kept | None = None
        self._use: AdapterUse | None = None

    def lacks_adapter(self) -> bool:
        """See Balancer.lacks_adapter."""
        return self._balancer.lacks_adapter(self._model)

    async def bring(self) -> None:
        """Load the adapter in an engine, if the version is served as one, and keep it for this lease until `drop`.

        Raises:
            EngineUnavailableError: no engine takes requests now, or the engine ended meanwhile.
            ModelNotFoundError, QueueTimeoutError, AdapterFailedError: as `Balancer.lease` says.
        """
        self.drop()
        engine, served = self._balancer.choose(self._model, self._without)
        adapters = engine.adapters
        if adapters is None:
            return
        engine.reserved += 1
        try:
            self._kept = _Kept(engine, adapters, await _brought(engine, adapters, served))
        except BaseException:
            engine.reserved -= 1
            raise

    def drop(self) -> None:
        """Stop keeping an adapter."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            kept.engine.reserved -= 1
            kept.use.leave()

    def enter(self) -> Lease | None:
        """Return an engine, to be left with `__aexit__`; None where its adapter has to be brought.

        Raises:
            ModelNotFoundError, EngineUnavailableError: as `Balancer.lease` says.
        """
        engine, served = self._balancer.choose(self._model, self._without, self._kept)
        name, show = engine.client.model, None
        if engine.adapters is not None:
            self._use = self._kept_use(engine, served) or engine.take_adapter(served.version)
            if self._use is None:
                return None
            name = self._use.adapter.name
            # Exact: no client can know the private name, which has a random part.
            show = methodcaller("replace", name.encode(), str(served.version).encode())
        self.drop()
        self._engine = engine
        engine.occupy()
        return Lease(engine.http, served, name, self._balancer.pace, show)

    def _kept_use(self, engine: Replica, served: Target) -> AdapterUse | None:
        kept = self._kept
        if kept is None or not kept.fits(engine, served):
            return None
        kept.engine.reserved -= 1
        self._kept = None
        return kept.use

    async def __aenter__(self) -> Lease:
        try:
            while (lease := self.enter()) is None:
                await self.bring()
        except BaseException:
            self.drop()
            raise
        return lease

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._use is not None:
            self._use.leave()
        if isinstance(error, EngineDiedError):
            self._engine.watch.suspect()
        self._engine.vacate()


def _lacks_adapter(engine: Replica, served: Target) -> bool:
    return engine.adapters is not None and not engine.adapters.has(served.version)


async def _brought(engine: Replica, adapters: EngineAdapters, served: Target) -> AdapterUse:
    """The use of a version's adapter.

    Raises:
        EngineUnavailableError: the engine died, or was ended, meanwhile.
        AdapterFailedError: for clients; the log has the reason.
    """
    try:
        return await engine.bring_adapter(served.version)
    except (AdmissionError, ModelNotFoundError):
        raise
    except Exception as error:
        if engine.adapters is adapters:
            if await engine.client.health() not in DOWN:
                raise AdapterFailedError(
                    f"the adapter of {served.version} could not be loaded; the server's log says why",
                    todo="send the request again later",
                ) from error
            engine.watch.suspect()
        raise EngineUnavailableError("the engine ended", todo="send the request again later") from error
