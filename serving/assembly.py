"""Builds the parts of one server, once: who gets what, passed explicitly. Runs nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, disable_created_metrics
from sqlalchemy import Engine as Store
from starlette.types import ASGIApp

from serving.admission.admission import Admission
from serving.admission.rate_limiter import RateLimiter
from serving.background.holdout import HoldoutRuns
from serving.background.scheduler import BackgroundScheduler
from serving.background.scoring import LiveScores
from serving.deployment import Deployment
from serving.deployments import Deployments, MakeRoom, OnFailure, OnReady
from serving.engines.balancer import Balancer
from serving.engines.places import EnginePlaces
from serving.engines.pool import EnginePool
from serving.engines.removed_adapters import RemovedAdapters
from serving.engines.replica import Replica
from serving.engines.served_model import served_model
from serving.engines.slots import EngineSlots
from serving.engines.verification import Verification
from serving.http.administration import Administration
from serving.http.app import build_app
from serving.http.authentication import Authentication
from serving.http.body_slots import BodySlots
from serving.http.delivery import AnswerBuffers
from serving.http.feedback import FeedbackIntake
from serving.http.inference import Gateway
from serving.model_names import ModelNames
from serving.rollout.engine_change import EngineChange
from serving.rollout.idling import Idling
from serving.rollout.production_alias import ProductionAlias
from serving.rollout.reconciler import Reconciler
from serving.rollout.swap import Swap
from serving.rollout.swap_plan import SwapPlanner
from serving.rollout.version_changes import VersionChanges
from serving.router import Router
from serving.telemetry.deployment_metrics import DeploymentInstruments, DeploymentMetrics
from serving.telemetry.engine_metrics import EngineMetrics
from serving.telemetry.loop_lag import LoopLag
from serving.telemetry.machine_metrics import add_machine_metrics
from serving.telemetry.metrics import GatewayMetrics
from serving.telemetry.request_log import RequestLog
from serving.telemetry.usage_writer import UsageWriter
from svc.access.authenticator import Authenticator
from svc.access.usage_meter import UsageMeter
from svc.engine.capabilities import Capabilities
from svc.engine.probes import engine_facts
from svc.engine.vllm.headroom import shortage
from svc.engine.vllm.launch import EngineSpec
from svc.errors import EngineError
from svc.registry.registry import Registry
from svc.remote.listening import is_loopback
from svc.settings import EngineSettings, Settings, TelemetrySettings
from svc.store.desired import Desired
from svc.version import Target

if TYPE_CHECKING:
    from serving.telemetry.traces.traces import Traces


@dataclass(frozen=True, slots=True)
class Parts:
    """What of a server runs, or is to be ended."""

    app: ASGIApp
    request_log: RequestLog
    deployments: Deployments
    loop_lag: LoopLag
    usage_writer: UsageWriter
    authentication: Authentication
    traces: "Traces | None"


def assemble(
    settings: Settings,
    registry: Registry,
    store: Store,
    capabilities: Capabilities,
    authenticator: Authenticator,
    *,
    on_phase: Callable[[str], None],
    on_ready: OnReady,
    on_failure: OnFailure,
) -> Parts:
    """All parts of a server; which models it serves, its deployments are told when they run.

    Args:
        capabilities: of this device.
        authenticator: has looked at the store's keys.
        on_phase: hears what an engine's start is doing.
        on_ready: hears what is served, whenever a model has come.
        on_failure: hears why a model cannot be served.
    """
    limits = settings.serve
    disable_created_metrics()  # type: ignore[no-untyped-call]
    collector = CollectorRegistry()
    metrics = GatewayMetrics(collector)
    add_machine_metrics(collector, settings.home, capabilities, settings.engine)
    router = Router()
    slots = EngineSlots(settings, capabilities, served=lambda: router.served)
    places = EnginePlaces(slots)
    build = _DeploymentBuilder(
        settings, registry, store, capabilities, slots, places, metrics, DeploymentInstruments(collector), on_phase
    )
    deployments = Deployments(
        build.build,
        router=router,
        places=places,
        store=store,
        check_memory=partial(_check_memory, slots, registry),
        registered=registry.names,
        on_ready=on_ready,
        on_failure=on_failure,
    )
    traces = make_traces(settings.telemetry, metrics)
    request_log = RequestLog(
        store, settings.request_log, on_stored=metrics.rows_stored, on_dropped=metrics.rows_dropped, spans=traces
    )
    engine_metrics = EngineMetrics(lambda: [source for each in deployments.all for source in each.pool.sources()])
    collector.register(engine_metrics)
    limiter, usage = RateLimiter(), UsageMeter(store)
    gateway = Gateway(
        router=router,
        body_slots=BodySlots(limits.max_running + limits.max_queued),
        metrics=metrics,
        request_log=request_log,
        settings=limits,
        request_limits=settings.request_limits,
        buffers=AnswerBuffers(max_bytes=limits.max_buffered_bytes),
        limiter=limiter,
        usage=usage,
        begin_trace=traces.begin if traces else None,
    )
    feedback = FeedbackIntake(store, request_log, metrics.feedback_given)
    authentication = Authentication(
        authenticator, keys_needed=not is_loopback(limits.host), on_failure=metrics.authentication_failed
    )
    app = build_app(
        gateway,
        feedback=feedback,
        engine_metrics=engine_metrics,
        status=deployments.status,
        authentication=authentication,
        administration=Administration(store, VersionChanges(registry, store, deployments.served)),
    )
    usage_writer = UsageWriter(store, usage, on_known=limiter.add_used_today)
    return Parts(app, request_log, deployments, LoopLag(metrics.loop_lagged), usage_writer, authentication, traces)


def make_traces(settings: TelemetrySettings, metrics: GatewayMetrics) -> "Traces | None":
    """Where they are sent; None, and nothing of OpenTelemetry is loaded, where no receiver is set.

    Raises:
        SettingsError: a variable with headers for the receiver is malformed.
    """
    if settings.otlp_endpoint is None:
        return None
    from serving.telemetry.traces.exporter import otlp_exporter
    from serving.telemetry.traces.traces import Traces

    return Traces(
        otlp_exporter(settings.otlp_endpoint),
        sample_share=settings.sample_share,
        release=version("tuneserve"),
        on_sent=metrics.spans_sent,
        on_dropped=metrics.spans_dropped,
    )


def _check_memory(slots: EngineSlots, registry: Registry, targets: Sequence[Target]) -> None:
    """Raises where there is no memory for the engines of these versions.

    Raises:
        EngineError: with what they need, and what is free.
        NotFoundError: no such version or format.
    """
    adapters = slots.settings.adapters
    specs = [slots.spec(0, target.version.name, served_model(registry, target, adapters)) for target in targets]
    missing = shortage([spec for spec in specs for _ in range(spec.settings.replicas)])
    if missing:
        raise EngineError(
            f"no memory for {', '.join(str(target) for target in targets)}: {missing}",
            todo="serve fewer models, or give each less: `models` in svc.yaml, `max_model_len` and `replicas` there",
        )


@dataclass(frozen=True, slots=True)
class _DeploymentBuilder:
    """Builds what a model needs of its own, over what all have in common."""

    settings: Settings
    registry: Registry
    store: Store
    capabilities: Capabilities
    slots: EngineSlots
    places: EnginePlaces
    gateway_metrics: GatewayMetrics
    instruments: DeploymentInstruments
    on_phase: Callable[[str], None]

    def build(self, desired: Desired, make_room: MakeRoom) -> Deployment:
        """A deployment that serves nothing yet.

        Args:
            desired: what it is to serve first.
            make_room: for its engines.
        """
        name, engine = desired.name, self.settings.engine_for(desired.name)
        metrics = DeploymentMetrics(self.instruments, name, on_loaded=self.gateway_metrics.show_errors)
        self.gateway_metrics.show_errors(None, name)
        names, admission = ModelNames(name), self._admission(engine)
        metrics.watch_admission(lambda: admission.running, lambda: admission.queued)
        facts = partial(engine_facts, engine, self.capabilities)
        verification = Verification(self.registry, self.store, facts, self.settings.adapters)
        pool = self._pool(engine, names, admission, verification, metrics)
        alias, missing = ProductionAlias(self.registry.tracking), partial(self._missing, name)
        reconciler = Reconciler(
            desired,
            store=self.store,
            pool=pool,
            swap=self._swap(missing, pool, verification, admission, names),
            names=names,
            metrics=metrics,
            alias=alias,
            shortage=missing,
        )
        idling = Idling(
            pool,
            admission,
            metrics,
            target=lambda: reconciler.actual.target,
            idle_s=self.settings.idle_s_of(name),
            promoting=lambda: reconciler.promoting,
            make_room=lambda: make_room(reconciler.actual.target),
            on_error=reconciler.note_error,
        )
        holdout, scores = self._background(admission, pool, verification, metrics)
        return Deployment(
            names=names,
            admission=admission,
            pool=pool,
            balancer=Balancer(pool, names),
            reconciler=reconciler,
            idling=idling,
            removed=RemovedAdapters(pool, partial(verification.registered, name)),
            alias=alias,
            holdout=holdout,
            scores=scores,
            metrics=metrics,
            store=self.store,
            context=engine.max_model_len,
        )

    def _admission(self, engine: EngineSettings) -> Admission:
        limits = self.settings.serve
        return Admission(
            max_running=limits.max_running,
            max_tokens=limits.max_running_tokens or limits.max_running * engine.max_model_len,
            max_queued=limits.max_queued,
            queue_timeout_s=limits.queue_timeout_s,
            wake_timeout_s=engine.start_timeout_s,
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
            )

        return EnginePool(
            make,
            places=self.places,
            size=engine.replicas,
            admission=admission,
            names=names,
            metrics=metrics,
            retire_timeout_s=self.settings.serve.retire_timeout_s,
        )

    def _spec(self, name: str, target: Target) -> EngineSpec:
        """How an engine for a version would be started."""
        return self.slots.spec(0, name, served_model(self.registry, target, self.settings.adapters))

    def _missing(self, name: str, target: Target, engines: int) -> str | None:
        """Why there is no memory for so many engines more; None where there is."""
        return shortage([self._spec(name, target)] * engines)

    def _swap(
        self,
        missing: Callable[[Target, int], str | None],
        pool: EnginePool,
        verification: Verification,
        admission: Admission,
        names: ModelNames,
    ) -> Swap:
        limits = self.settings.serve
        planner = SwapPlanner(
            registry=self.registry,
            verification=verification,
            pool=pool,
            choice=limits.swap,
            shortage=missing,
            capabilities=lambda target: self._spec(target.version.name, target).engine_capabilities,
            patience_s=limits.drain_timeout_s,
        )
        engine_change = EngineChange(
            planner=planner,
            verification=verification,
            pool=pool,
            admission=admission,
            names=names,
            drain_timeout_s=limits.drain_timeout_s,
            retire_timeout_s=limits.retire_timeout_s,
        )
        return Swap(planner=planner, engine_change=engine_change, pool=pool, admission=admission, names=names)

    def _background(
        self,
        admission: Admission,
        pool: EnginePool,
        verification: Verification,
        metrics: DeploymentMetrics,
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
        )
        scores = LiveScores(
            scheduler,
            busy=lambda: holdout.under_way,
            pool=pool,
            registry=self.registry,
            store=self.store,
            per_hour=settings.holdout.scored_per_hour if settings.request_log.content_share else 0,
        )
        return holdout, scores
