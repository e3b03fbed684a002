"""Leases an admission slot and an engine for one request, after loading the request's adapter.

A request that held a slot while waiting for its adapter would keep others from an idle engine. Knows nothing of HTTP.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import TracebackType

from serving.admission.admission import Admission
from serving.admission.errors import EngineUnavailableError
from serving.admission.party import Party
from serving.replicas.balancer import Lease, Leasing


class AdmittedLease:
    """A lease of an admission slot and an engine, for the body of an `async with`.

    The engine and the version are chosen after the request has its slot, so a request that was queued during a swap
    gets the new version. If the adapter is not loaded then, because the engine was asleep, stopped or started by the
    swap, the request releases its slot, loads the adapter and is admitted again.

    Args:
        tokens, party: see Admission.enter.
        waiting: limits the number of requests that wait for adapters; entered only during such a wait.

    Entering raises the errors of `Admission.enter`, `Balancer.lease` and `waiting`.
    """

    __slots__ = ("_admission", "_leasing", "_party", "_tokens", "_waiting")

    def __init__(
        self,
        admission: Admission,
        leasing: Leasing,
        tokens: int,
        party: Party,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._admission = admission
        self._leasing = leasing
        self._tokens = tokens
        self._party = party
        self._waiting = waiting

    async def __aenter__(self) -> Lease:
        try:
            waited = self._leasing.lacks_adapter()
            if waited:
                await self._bring()
            while True:
                await self._admission.enter(self._tokens, self._party, may_wait=waited)
                try:
                    lease = self._leasing.enter()
                except BaseException:
                    self._admission.leave(self._tokens)
                    raise
                if lease is not None:
                    return lease
                self._admission.leave(self._tokens)
                waited = True
                await self._bring()
        except BaseException:
            self._leasing.drop()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._leasing.__aexit__(kind, error, trace)
        finally:
            self._admission.leave(self._tokens)

    async def _bring(self) -> None:
        # Without an engine, admission decides whether to wait for another one.
        with self._waiting(), self._admission.preparing(), suppress(EngineUnavailableError):
            await self._leasing.bring()
