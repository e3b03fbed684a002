"""Chooses an engine from the pool for a request, and looks up the requested version's name in that engine.

This module does not depend on HTTP or on how engines start and stop.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import blake2b
from operator import methodcaller
from types import TracebackType
from typing import NamedTuple

from serving.admission.errors import ENGINE_RETRY_S, AdmissionError, EngineUnavailableError
from serving.engines.adapter_cache import AdapterCache, AdapterUse
from serving.engines.model_names import ModelNames, ModelNotFoundError
from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.engines.token_pace import TokenPace
from serving.engines.transport import EngineDiedError
from serving.protocols.error_code import ErrorCode, answered_with
from svc.engine.client import DOWN
from svc.engine.vllm.connection_pool import EngineConnections
from svc.errors import EngineError
from svc.version import Format, Target

_PRIME = 2**61 - 1
_MAX_SHARE = 1.25
"""Maximum load at which an engine still receives further requests of a conversation that it has served. The load is the
engine's number of requests divided by the mean over all engines.

See "Consistent Hashing with Bounded Loads" (Mirrokni, Thorup and Zadimoghaddam, 2016).
"""


@answered_with(503, ErrorCode.ENGINE_ADAPTER_FAILED)
class AdapterFailedError(EngineError):
    """Raised when a version's adapter could not be loaded or failed its probes.

    The next request tries to load it again.
    """

    retry_after_s = ENGINE_RETRY_S


class Lease(NamedTuple):
    """An engine leased to one request.

    Attributes:
        http: client with connections to the engine.
        served: the version that answers the request.
        engine_model: the version's name in the engine.
        pace: generation speed of the model's engines.
        show: function that replaces an adapter's private name with the version's name in a complete event or
            response body. None if the version has no private name.
    """

    http: EngineConnections
    served: Target
    engine_model: str
    pace: TokenPace
    show: Callable[[bytes], bytes] | None = None


class Balancer:
    """Distributes requests across the ready engines."""

    def __init__(self, pool: EnginePool, names: ModelNames) -> None:
        self._pool = pool
        self._names = names
        self.pace = TokenPace()

    async def check(self, model: str) -> None:
        """Check that a model name can be served. The registry is read only if necessary.

        Raises:
            ModelNotFoundError: no version has this name.
            EngineUnavailableError: no version is loaded yet.
        """
        wanted = self._names.resolve(model)
        if wanted is None:
            return
        ready = self._pool.ready_for(wanted)
        if any(engine.target and engine.target.version == wanted for engine in ready):
            return
        adapters = [engine.adapters for engine in ready if engine.adapters]
        if adapters and not any(each.has(wanted) for each in adapters):
            await adapters[0].check(wanted)

    def lease(self, model: str, *, who: str = "", without: Lease | None = None) -> "Leasing":
        """Lease an engine for the duration of the `with` block.

        If the version has an adapter, it is loaded first. Engines that have already loaded the adapter are preferred.
        If several engines are equally suitable, `_choose_engine` decides.

        Args:
            model: model name as sent by the client.
            who: text that identifies the client or conversation; empty if unknown.
            without: lease of an engine that must not be chosen.

        Entering raises:
            ModelNotFoundError: no version has this name.
            EngineUnavailableError: no engine is currently accepting requests.
            QueueTimeoutError: all slots for adapters were in use for too long.
            AdapterFailedError: the version's adapter could not be loaded, or failed its probes.
        """
        return Leasing(self, model, who, without)

    def lacks_adapter(self, model: str) -> bool:
        """Return whether a request would have to wait for an adapter in the engine that `choose` would return now.

        The result is False if no engine accepts requests: the request then waits for admission, which wakes a
        sleeping engine.

        Raises:
            ModelNotFoundError: no version has this name.
        """
        served = self._names.served
        if served is None or served.format is not Format.ADAPTER:
            return False
        try:
            engine, served = self.choose(model)
        except EngineUnavailableError:
            return False
        return engine.lacks_adapter(served.version)

    def choose(
        self, model: str, who: str = "", without: Lease | None = None, held: "_HeldAdapter | None" = None
    ) -> tuple[Replica, Target]:
        """Choose an engine for a request. Return it with the target (version and format) that will answer.

        Args:
            who, without: see `lease`.
            held: an adapter held for the request. Its engine is chosen if the adapter is still loaded there and the
                request still needs it.

        Raises:
            ModelNotFoundError, EngineUnavailableError: see `lease`.
        """
        wanted = self._names.resolve(model)
        engines = self._pool.ready_for(wanted)
        if engines and without is None and held is None:
            engine = _choose_engine(engines, who)
            served = engine.serves(wanted)
            if served is not None and engine.adapters is None and not engine.watch.suspected:
                return engine, served
        candidates = list[tuple[Replica, Target]]()
        for engine in engines:
            if not engine.watch.suspected and (without is None or engine.http is not without.http):
                served = engine.serves(wanted)
                if served is not None:
                    candidates.append((engine, served))
        if not candidates and wanted is not None and model == self._names.assigned:
            return self.choose(self._names.name, who, without, held)  # the candidate's engine has just died
        if not candidates:
            raise EngineUnavailableError("no engine is currently accepting requests", todo="retry the request later")
        if len(candidates) == 1:
            return candidates[0]
        if held is not None and (same := next((pair for pair in candidates if held.fits(*pair)), None)):
            return same
        prepared = [pair for pair in candidates if not _lacks_adapter(*pair)]
        # No engine has cached prompts of an adapter that it has not loaded.
        pairs, who = (prepared, who) if prepared else (candidates, "")
        chosen = _choose_engine([engine for engine, _ in pairs], who)
        return next(pair for pair in pairs if pair[0] is chosen)


class _HeldAdapter(NamedTuple):
    """An adapter held for a request that has not been admitted yet.

    Attributes:
        adapters: the adapter cache that `engine` had when the adapter was taken. A restarted engine has a new cache.
    """

    engine: Replica
    adapters: AdapterCache
    use: AdapterUse

    def fits(self, engine: Replica, served: Target) -> bool:
        """Return whether this is the adapter that `engine` would use to serve the target."""
        return engine is self.engine and engine.adapters is self.adapters and served.version == self.use.adapter.version


class Leasing:
    """Context manager that leases an engine.

    This is a class because a generator would cost several times as much CPU time. Entering the context waits for the
    adapter. Callers that must not wait call `enter` instead, and call `hold_adapter` once they may wait.
    """

    __slots__ = ("_balancer", "_engine", "_held", "_model", "_use", "_who", "_without")

    def __init__(self, balancer: Balancer, model: str, who: str, without: Lease | None) -> None:
        self._balancer = balancer
        self._model = model
        self._who = who
        self._without = without
        self._engine: Replica
        self._held: _HeldAdapter | None = None
        self._use: AdapterUse | None = None

    def lacks_adapter(self) -> bool:
        """See Balancer.lacks_adapter."""
        return self._balancer.lacks_adapter(self._model)

    async def hold_adapter(self) -> None:
        """Load the version in an engine, if it is served as an adapter, and keep it loaded until `drop` is called.

        Raises:
            EngineUnavailableError: no engine is currently accepting requests, or the engine stopped during the
                load.
            ModelNotFoundError, QueueTimeoutError, AdapterFailedError: see `Balancer.lease`.
        """
        self.drop()
        engine, served = self._balancer.choose(self._model, self._who, self._without)
        adapters = engine.adapters
        if adapters is None:
            return
        engine.reserved += 1
        try:
            self._held = _HeldAdapter(engine, adapters, await _acquired(engine, adapters, served))
        except BaseException:
            engine.reserved -= 1
            raise

    def drop(self) -> None:
        """Release the adapter that `hold_adapter` loaded."""
        if self._held is not None:
            held, self._held = self._held, None
            held.engine.reserved -= 1
            held.use.leave()

    def enter(self) -> Lease | None:
        """Return a lease of an engine, or None if the adapter must first be loaded with `hold_adapter`.

        The caller must release the engine by calling `__aexit__`.

        Raises:
            ModelNotFoundError, EngineUnavailableError: see `Balancer.lease`.
        """
        engine, served = self._balancer.choose(self._model, self._who, self._without, self._held)
        name, show = engine.client.model, None
        if engine.adapters is not None:
            self._use = self._kept_use(engine, served) or engine.take_adapter(served.version)
            if self._use is None:
                return None
            name = self._use.adapter.name
            # Replacing the text is safe: no client can know the private name, which has a random part.
            show = methodcaller("replace", name.encode(), str(served.version).encode())
        self.drop()
        self._engine = engine
        engine.occupy()
        return Lease(engine.http, served, name, self._balancer.pace, show)

    def _kept_use(self, engine: Replica, served: Target) -> AdapterUse | None:
        held = self._held
        if held is None or not held.fits(engine, served):
            return None
        held.engine.reserved -= 1
        self._held = None
        return held.use

    async def __aenter__(self) -> Lease:
        try:
            while (lease := self.enter()) is None:
                await self.hold_adapter()
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
        self._engine.release()


def _choose_engine(engines: Sequence[Replica], who: str) -> Replica:
    """Return the engine that has probably cached the beginning of a client's or conversation's prompt.

    Each client or conversation ranks the engines in its own order, which survives a restart of the server (rendezvous
    hashing). The first engine with capacity for another request is chosen. A request from an unknown client goes to the
    engine with the fewest requests.
    """
    loads = [engine.running + engine.reserved for engine in engines]
    if len(engines) == 1:
        return engines[0]
    if not who:
        return engines[loads.index(min(loads))]
    most = math.ceil(_MAX_SHARE * (sum(loads) + 1) / len(loads))
    free = [engine for engine, load in zip(engines, loads, strict=True) if load < most]
    client = _hash(who)
    places = [client * _hash_of_number(engine.replica) % _PRIME for engine in free]
    return free[places.index(max(places))]


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


@cache
def _hash_of_number(replica: int) -> int:
    return _hash(str(replica))


def _lacks_adapter(engine: Replica, served: Target) -> bool:
    return engine.adapters is not None and not engine.adapters.has(served.version)


async def _acquired(engine: Replica, adapters: AdapterCache, served: Target) -> AdapterUse:
    """Return a claim on a version's adapter, loading the adapter first if necessary.

    Raises:
        EngineUnavailableError: the engine died or was stopped during the load.
        AdapterFailedError: the adapter cannot be used. The reason is logged.
    """
    try:
        return await engine.acquire_adapter(served.version)
    except (AdmissionError, ModelNotFoundError):
        raise
    except Exception as error:
        if engine.adapters is adapters:
            if await engine.client.health() not in DOWN:
                raise AdapterFailedError(
                    f"the adapter of {served.version} could not be loaded; see the server's log",
                    todo="retry the request later",
                ) from error
            engine.watch.suspect()
        raise EngineUnavailableError("the engine stopped", todo="retry the request later") from error
