"""Which engine of a pool takes a request, and what it calls the version that is asked for.

Knows neither HTTP nor how engines come and go.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from serving.admission.errors import ENGINE_RETRY_S, AdmissionError, EngineUnavailableError
from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.engines.transport import EngineDiedError
from serving.model_names import ModelNames, ModelNotFoundError
from svc.engine.vllm.connection_pool import EngineConnections
from svc.errors import EngineError
from svc.version import Target, VersionId


class AdapterFailedError(EngineError):
    """A version's adapter could not be loaded, or is not what it should be; the next request tries again."""

    retry_after_s = ENGINE_RETRY_S


@dataclass(frozen=True, slots=True)
class Lease:
    """An engine for one request.

    Attributes:
        http: connections to the engine.
        served: the version that answers.
        engine_model: what the engine calls it.
    """

    http: EngineConnections
    served: Target
    engine_model: str


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
        wanted, ready = self._names.resolve(model), self._pool.ready
        if wanted is None or any(engine.target and engine.target.version == wanted for engine in ready):
            return
        adapters = [engine.adapters for engine in ready if engine.adapters]
        if adapters and not any(each.has(wanted) for each in adapters):
            await adapters[0].check(wanted)

    @asynccontextmanager
    async def lease(self, model: str, *, without: Lease | None = None) -> AsyncIterator[Lease]:
        """An engine for a request, the one in which the fewest run, for the body; its adapter is loaded first.

        Of engines that apply adapters one is preferred that has the version's.

        Args:
            model: a client's name for what it wants.
            without: another one than this.

        Raises:
            ModelNotFoundError: nothing answers to it.
            EngineUnavailableError: no engine takes requests now.
            QueueTimeoutError: all places for adapters were in use for too long.
            AdapterFailedError: the version's adapter could not be loaded, or is not what it should be.
        """
        engine, served = self._choose(self._names.resolve(model), without)
        with engine.occupied():
            try:
                if engine.adapters is None:
                    yield Lease(engine.http, served, engine.client.model)
                    return
                async with AsyncExitStack() as used:
                    name = await _enter(used, engine, served)
                    yield Lease(engine.http, served, name)
            except EngineDiedError:
                engine.watch.suspect()
                raise

    def _choose(self, wanted: VersionId | None, without: Lease | None) -> tuple[Replica, Target]:
        able = [(engine, engine.serves(wanted)) for engine in self._pool.ready if not engine.watch.suspected]
        if without is not None:
            able = [(engine, served) for engine, served in able if engine.http is not without.http]
        found = [(engine, served) for engine, served in able if served]
        if not found:
            raise EngineUnavailableError("no engine takes requests now", todo="send the request again later")
        return min(found, key=lambda pair: (_lacks_adapter(*pair), pair[0].running))


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
