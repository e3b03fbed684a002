"""Leases an admission slot and an engine for one request, after loading the request's adapter.

If a request held its slot while waiting for an adapter, it would prevent other requests from using an idle engine. This
module does not depend on HTTP.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from types import TracebackType

from serving.admission.admission import Admission
from serving.admission.errors import EngineUnavailableError
from serving.admission.tenant import Tenant
from serving.engines.balancer import Lease, Leasing


@dataclass(slots=True, eq=False)
class AdmittedLease:
    """Async context manager that leases an admission slot and an engine.

    The engine and the version are chosen after the request has its slot, so a request that was queued during
    a swap gets the new version. If its adapter is not loaded at that point, because the engine was asleep,
    stopped or started by the swap, the request releases its slot, loads the adapter and is admitted again.

    Attributes:
        tokens, tenant: the request's cost and its tenant; see `Admission.enter`.
        waiting: context manager that limits the number of requests waiting for adapters. It is entered only
            during such a wait.

    Entering the context raises the same errors as `Admission.enter`, `Balancer.lease` and `waiting`.
    """

    admission: Admission
    leasing: Leasing
    tokens: int
    tenant: Tenant
    waiting: Callable[[], AbstractContextManager[None]]

    async def __aenter__(self) -> Lease:
        try:
            # A request in a batch loads its adapter once there is spare capacity.
            waited = self.tenant.interruption is None and self.leasing.lacks_adapter()
            if waited:
                await self._bring()
            while True:
                await self.admission.enter(self.tokens, self.tenant, may_wait=waited)
                try:
                    lease = self.leasing.enter()
                except BaseException:
                    self.admission.leave(self.tokens, self.tenant)
                    raise
                if lease is not None:
                    return lease
                self.admission.leave(self.tokens, self.tenant)
                waited = True
                await self._bring()
        except BaseException:
            self.leasing.drop()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.leasing.__aexit__(kind, error, trace)
        finally:
            self.admission.leave(self.tokens, self.tenant)

    async def _bring(self) -> None:
        # Without an engine, admission decides whether to wait for another one.
        with self.waiting(), self.admission.preparing(), suppress(EngineUnavailableError):
            await self.leasing.hold_adapter()
