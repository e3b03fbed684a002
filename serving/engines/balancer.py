"""Which engine of a pool takes a request, and what it calls the version that is asked for.

Knows neither HTTP nor how engines come and go.
"""

from collections.abc import Callable
from contextlib import AsyncExitStack
from operator import methodcaller
from types import TracebackType
from typing import NamedTuple

from serving.admission.errors import ENGINE_RETRY_S, AdmissionError, EngineUnavailableError
from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.engines.token_pace import TokenPace
from serving.engines.transport import EngineDiedError
from serving.model_names import ModelNames, ModelNotFoundError
from svc.engine.vllm.connection_pool import EngineConnections
from svc.errors import EngineError
from svc.version import Target


class AdapterFailedError(EngineError):
    """A version's adapter could not be loaded, or is not what it should be; the next request tries again."""

    retry_after_s = ENGINE_RETRY_S


class Lease(NamedTuple):
    """An engine for one request.

    Attributes:
        http: connections to the engine.
        served: the version that answers.
        engine_model: what the engine calls it.
        pace: how fast the engine generates.
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

    def choose(self, model: str, without: Lease | None) -> tuple[Replica, Target]:
        """An engine, and what it answers with.

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
        return min(found, key=lambda pair: (_lacks_adapter(*pair), pair[0].running))


class Leasing:
    """A lease for the body of an `async with`. A class, since a generator costs several times as much."""

    __slots__ = ("_adapter", "_balancer", "_engine", "_model", "_without")

    def __init__(self, balancer: Balancer, model: str, without: Lease | None) -> None:
        self._balancer = balancer
        self._model = model
        self._without = without
        self._engine: Replica
        self._adapter: AsyncExitStack | None = None

    async def __aenter__(self) -> Lease:
        self._engine, served = self._balancer.choose(self._model, self._without)
        self._engine.occupy()
        try:
            if self._engine.adapters is None:
                return Lease(self._engine.http, served, self._engine.client.model, self._engine.pace)
            self._adapter = AsyncExitStack()
            name = await _enter(self._adapter, self._engine, served)
            # Exact: no client can know the private name, which has a random part.
            show = methodcaller("replace", name.encode(), str(served.version).encode())
            return Lease(self._engine.http, served, name, self._engine.pace, show)
        except BaseException as error:
            self._ended(error)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._adapter is not None:
                await self._adapter.__aexit__(kind, error, trace)
        finally:
            self._ended(error)

    def _ended(self, error: BaseException | None) -> None:
        if isinstance(error, EngineDiedError):
            self._engine.watch.suspect()
        self._engine.vacate()


def _lacks_adapter(engine: Replica, served: Target) -> bool:
    return engine.adapters is not None and not engine.adapters.has(served.version)


async def _enter(used: AsyncExitStack, engine: Replica, served: Target) -> str:
    """What the engine calls a version, from now on until the end of `used`.

    Raises:
        AdapterFailedError: for clients; the log has the reason.
    """
    try:
        return await used.enter_async_context(engine.use(served.version))
    except (AdmissionError, ModelNotFoundError):
        raise
    except Exception as error:
        raise AdapterFailedError(
            f"the adapter of {served.version} could not be loaded; the server's log says why",
            todo="send the request again later",
        ) from error
