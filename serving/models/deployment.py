"""A model on a server, with its admission control, engines and rollouts, and the server's own requests to the model."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.admission.admission import Admission
from serving.admission.tenant import Tenant
from serving.background.holdout import HoldoutRuns
from serving.background.scoring import LiveScores
from serving.engines.adapter_cache import AdapterCache
from serving.engines.admitted_lease import AdmittedLease
from serving.engines.balancer import Balancer, Lease
from serving.engines.model_names import ModelNames
from serving.engines.pool import EnginePool
from serving.engines.removed_adapters import RemovedAdapters
from serving.rollout.idling import Idling
from serving.rollout.journal import swap_row
from serving.rollout.production_alias import ProductionAlias
from serving.rollout.reconciler import Reconciler
from serving.rollout.replica_scaling import ReplicaScaling
from serving.rollout.rollout import Rollouts
from serving.telemetry.deployment_metrics import DeploymentMetrics
from svc.store.outage_log import log_store_error
from svc.store.rollouts import RolloutView, active_rollout
from svc.store.swaps import last_swap
from svc.version import Format, VersionId

log = logging.getLogger(__name__)

_RESTART_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True)
class Deployment:
    """All components of one served model.

    Attributes:
        scaling: adjusts the number of replicas to the load; None if the number is fixed.
        server: id of this server; empty if no other server can use the store.
        context: maximum combined length of prompt and answer, in tokens.
    """

    names: ModelNames
    admission: Admission
    pool: EnginePool
    balancer: Balancer
    reconciler: Reconciler
    rollouts: Rollouts
    idling: Idling
    scaling: ReplicaScaling | None
    removed: RemovedAdapters
    alias: ProductionAlias
    holdout: HoldoutRuns
    scores: LiveScores
    metrics: DeploymentMetrics
    store: Store
    server: str
    context: int

    @property
    def name(self) -> str:
        return self.names.name

    def check(self, model: str) -> Coroutine[object, object, None]:
        """Check that a model name can be served. See `serving.engines.balancer.Balancer.check`."""
        return self.balancer.check(model)  # not a separate coroutine, which would cost time for each request

    async def takes(self, version: VersionId) -> bool:
        """Return whether the engines serve a version, or can apply it as an adapter. See
        `serving.models.router.Backend.takes`.
        """
        served = self.names.served
        if served is None:
            return False
        if version == served.version:
            return True
        if served.format is not Format.ADAPTER or not await self.pool.applies(version):
            self.names.guests.discard(version)
            return False
        if version.name != self.name:
            self.names.guests.add(version)
        return True

    def lease(self, model: str, *, who: str = "", without: Lease | None = None) -> AbstractAsyncContextManager[Lease]:
        """Lease an engine for the duration of the `with` body. See `serving.engines.balancer.Balancer.lease`."""
        return self.balancer.lease(model, who=who, without=without)

    def admitted(
        self, model: str, who: str, tokens: int, tenant: Tenant, waiting: Callable[[], AbstractContextManager[None]]
    ) -> AbstractAsyncContextManager[Lease]:
        """Wait for admission, then lease an engine for the duration of the `with` body. See `AdmittedLease`."""
        return AdmittedLease(self.admission, self.balancer.lease(model, who=who), tokens, tenant, waiting)

    async def run(self) -> None:
        """Run the components that keep the model in its desired state, until cancelled.

        Call `reconciler.start` first.
        """
        parts = {
            "promotions and rollouts": self.reconciler.follow,
            "restarts of engines": self.reconciler.reviver.run,
            "idling": self.idling.run,
            "removed adapters": self.removed.run,
            "production alias": self.alias.run,
            "held-out evaluations": self.holdout.run,
            "live scores": self.scores.run,
        }
        if self.scaling is not None:
            parts["number of replicas"] = self.scaling.run
        async with asyncio.TaskGroup() as tasks:
            for part, run in parts.items():
                tasks.create_task(self._keep_running(part, run))

    async def _keep_running(self, part: str, run: Callable[[], Awaitable[None]]) -> None:
        """Run a component until cancelled.

        After an unexpected error, restart it without stopping other components or models.
        """
        task = asyncio.current_task()
        while True:
            try:
                await run()
            except Exception as error:
                if task and task.cancelling():  # the defect is in the part's clean-up
                    raise
                log.exception("%s: unexpected error in the task %r; restarting it", self.name, part)
                self.reconciler.note_error(f"unexpected error in {part}: {error!r}")
            await asyncio.sleep(_RESTART_PAUSE_S)

    async def stop(self, *, leave: bool = False) -> None:
        """Stop the engines and close the journal. Call this after `run` has ended.

        Args:
            leave: whether to leave ready engines running, so that a server that starts later can adopt them.
        """
        try:
            await self.pool.stop(leave=leave)
        finally:
            await self.close()

    async def close(self) -> None:
        """Record that the model is no longer served, and close the journal.

        Call this after the engines have stopped.
        """
        self.reconciler.journal.stopped(self.name)
        await asyncio.to_thread(self.reconciler.journal.close)

    def status(self) -> Mapping[str, Any]:
        """Return the model's section of /svc/status as JSON values.

        This reads the store. While the store is unavailable, the values that come from the store are None.
        """
        actual, previous = self.reconciler.actual.target, self.reconciler.actual.previous
        unwritten = (
            self.reconciler.journal.unwritten
        )  # before the store is read, which then has results that are written meanwhile
        swap = rollout = holdout = None
        try:
            swap = last_swap(self.store, self.name, server=self.server)
            rollout = active_rollout(self.store, self.name)
            holdout, store = self.holdout.status(actual), "available"
        except SQLAlchemyError:
            log_store_error(log, "could not read the status of %s", self.name)
            store = "unavailable"
        if swap:
            swap = replace(swap, result=swap.result or unwritten.get(swap.id))
        return {
            "model": self.name,
            "version": str(actual.version),
            "format": actual.format.value,
            "previous": str(previous) if previous else None,
            "engine": {
                "state": self.pool.state.value,
                "restarts": self.pool.restarts,
                "last_error": self.reconciler.last_error,
                "plan": self.pool.plan,
            },
            "engines": [
                {
                    "replica": engine.replica,
                    "state": engine.state.value,
                    "version": str(target.version) if (target := engine.target) else None,
                    "verified": checked.verified if (checked := engine.checked) else None,
                    "verification": checked.found if checked else None,
                    "running": engine.running,
                    "adapters": _adapters(engine.adapters),
                    "asleep": engine.asleep,
                }
                for engine in self.pool.all
            ],
            "scaling": self.scaling.status() if self.scaling else None,
            "requests": {"running": self.admission.running, "queued": self.admission.queued},
            "store": store,
            "holdout": holdout,
            "rollout": rollout and RolloutView.of(rollout).model_dump(mode="json"),
            "last_swap": swap and {"to": str(swap.target), **swap_row(swap)},
        }


def _adapters(adapters: AdapterCache | None) -> list[dict[str, Any]] | None:
    """Return the adapters that an engine has loaded, or None if the engine does not use adapters."""
    if adapters is None:
        return None
    return [{"version": str(each.version), "verified": each.checked.verified} for each in adapters.loaded]
