"""Builds the components of one model, without starting them, and passes them their dependencies explicitly."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Engine as Store

from serving.admission.admission import Admission
from serving.background.holdout import HoldoutRuns
from serving.background.scheduler import BackgroundScheduler
from serving.background.scoring import LiveScores
from serving.engines.balancer import Balancer
from serving.engines.model_names import ModelNames
from serving.engines.pool import EnginePool
from serving.engines.removed_adapters import RemovedAdapters
from serving.engines.replica import Replica
from serving.engines.slots import EngineSlots
from serving.engines.verification import Verification
from serving.models.deployment import Deployment
from serving.models.deployments import MakeRoom
from serving.rollout.engine_change import EngineChange
from serving.rollout.idling import Idling
from serving.rollout.journal import Journal
from serving.rollout.leadership import Leadership
from serving.rollout.production_alias import ProductionAlias
from serving.rollout.reconciler import Reconciler
from serving.rollout.replica_scaling import ReplicaScaling
from serving.rollout.rollout import Rollouts
from serving.rollout.scaling import ScalingPolicy
from serving.rollout.swap import Swap
from serving.rollout.swap_plan import SwapPlanner
from serving.store_changes.changes import Changes
from serving.telemetry.deployment_metrics import DeploymentInstruments, DeploymentMetrics
from serving.telemetry.metrics import GatewayMetrics
from svc.registry.registry import Registry
from svc.settings.engine import EngineSettings
from svc.settings.settings import Settings
from svc.store.desired import Desired


@dataclass(frozen=True, slots=True)
class DeploymentBuilder:
    """Builds the components of each model on top of the components that all models share."""

    settings: Settings
    registry: Registry
    store: Store
    changes: Changes
    leadership: Leadership
    slots: EngineSlots
    gateway_metrics: GatewayMetrics
    instruments: DeploymentInstruments
    on_phase: Callable[[str], None]

    def build(self, desired: Desired, make_room: MakeRoom) -> Deployment:
        """Build a model's deployment, which serves nothing yet.

        Args:
            desired: the state to serve first.
            make_room: function that frees memory for the deployment's engines.
        """
        name, engine = desired.name, self.settings.engine_for(desired.name)
        metrics = DeploymentMetrics(self.instruments, name, on_loaded=self.gateway_metrics.show_errors)
        self.gateway_metrics.show_errors(None, name)
        names, admission = ModelNames(name), self._admission(engine)
        metrics.watch_admission(
            lambda: admission.running, lambda: admission.queued, lambda: admission.batch_slots.running
        )
        facts = partial(self.slots.facts, name)
        verification = Verification(self.registry, self.store, facts, self.settings.adapters)
        pool = self._pool(engine, names, admission, verification, metrics)
        planner, balancer = self._planner(pool, verification), Balancer(pool, names)
        leadership = partial(self.leadership.leads, name)

        def leads() -> bool:
            """Return whether this server is the model's leader. A model loaded without a promotion has no leader."""
            return reconciler.actual.generation > 0 and leadership()

        alias = ProductionAlias(self.registry.tracking, leads)
        journal = Journal(self.store, self.leadership.server)
        engine_change = EngineChange(
            planner=planner,
            verification=verification,
            pool=pool,
            drain_timeout_s=self.settings.serve.drain_timeout_s,
        )
        rollouts = Rollouts(
            store=self.store,
            changes=self.changes,
            leadership=self.leadership,
            balancer=balancer,
            engine_change=engine_change,
            report=journal.rollout_step,
            webhooks=tuple(each.url for each in self.settings.webhooks),
        )
        reconciler = Reconciler(
            desired,
            store=self.store,
            changes=self.changes,
            leadership=self.leadership,
            pool=pool,
            swap=Swap(engine_change),
            rollouts=rollouts,
            journal=journal,
            alias=alias,
        )
        idling = Idling(
            pool,
            target=lambda: reconciler.actual.target,
            timeout_s=self.settings.idle_s_of(name),
            promoting=lambda: reconciler.promoting,
            rolling_out=lambda: rollouts.active,
            make_room=lambda: make_room(reconciler.actual.target),
            on_error=reconciler.note_error,
        )
        limits = engine.replica_range
        metrics.replicas_wanted(limits.min)  # until the load needs more, and always if the number is fixed
        scaling = ReplicaScaling(
            policy=ScalingPolicy(limits.min, limits.max, engine.max_concurrency, limits.remove_after_s),
            pool=pool,
            target=lambda: reconciler.actual.target,
            changing=lambda: reconciler.promoting or rollouts.active,
        )
        holdout, scores = self._background(admission, pool, verification, metrics, leads)
        return Deployment(
            names=names,
            admission=admission,
            pool=pool,
            balancer=balancer,
            reconciler=reconciler,
            rollouts=rollouts,
            idling=idling,
            scaling=scaling if limits.min < limits.max else None,
            removed=RemovedAdapters(pool, verification.registered),
            alias=alias,
            holdout=holdout,
            scores=scores,
            metrics=metrics,
            store=self.store,
            server=self.leadership.server,
            context=engine.max_model_len,
        )

    def _admission(self, engine: EngineSettings) -> Admission:
        limits = self.settings.serve
        return Admission(
            max_running=limits.max_running,
            max_tokens=limits.max_running * engine.max_model_len,
            max_queued=limits.max_queued,
            queue_timeout_s=limits.queue_timeout_s,
            wake_timeout_s=engine.start_timeout_s,
            max_batched=self.settings.batches.concurrency,
            capacity=engine.max_concurrency * engine.replica_range.min,
        )

    def _pool(
        self,
        engine: EngineSettings,
        names: ModelNames,
        admission: Admission,
        verification: Verification,
        metrics: DeploymentMetrics,
    ) -> EnginePool:
        def make(number: int, on_change: Callable[[Replica], None]) -> Replica:
            return Replica(
                number,
                partial(self.slots.engine, number, names.name),
                verification,
                on_change,
                self.on_phase,
                turn=self.slots.turn,
                adapter_patience_s=self.settings.serve.queue_timeout_s,
                silence_s=self.settings.serve.request_timeout_s,
            )

        return EnginePool(
            make=make,
            slots=self.slots,
            size=engine.replica_range.min,
            most=engine.replica_range.max,
            admission=admission,
            names=names,
            metrics=metrics,
        )

    def _planner(self, pool: EnginePool, verification: Verification) -> SwapPlanner:
        limits = self.settings.serve
        return SwapPlanner(
            verification=verification,
            pool=pool,
            choice=limits.swap,
            patience_s=limits.drain_timeout_s,
        )

    def _background(
        self,
        admission: Admission,
        pool: EnginePool,
        verification: Verification,
        metrics: DeploymentMetrics,
        leads: Callable[[], bool],
    ) -> tuple[HoldoutRuns, LiveScores]:
        settings = self.settings
        scheduler = BackgroundScheduler(admission, pool, settings.holdout)
        holdout = HoldoutRuns(
            scheduler,
            pool=pool,
            registry=self.registry,
            store=self.store,
            metrics=metrics,
            facts=verification.facts,
            every_hours=settings.holdout.every_hours,
            run_functions=settings.holdout.run_functions,
            leads=leads,
        )
        scores = LiveScores(
            scheduler,
            busy=lambda: holdout.under_way or not leads(),
            pool=pool,
            registry=self.registry,
            store=self.store,
            per_hour=settings.holdout.scored_per_hour if settings.request_log.content_share else 0,
        )
        return holdout, scores
