"""Builds the parts of one server, once: who gets what, passed explicitly. Runs nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, disable_created_metrics
from sqlalchemy import Engine as Store

from serving.admission import Admission
from serving.background.holdout import HoldoutRuns
from serving.background.scheduler import BackgroundScheduler, unfit_engine
from serving.background.scoring import LiveScores
from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.engines.verification import Verification
from serving.http.app import build_app
from serving.http.delivery import AnswerBuffers
from serving.http.feedback import FeedbackIntake
from serving.http.inference import Gateway
from serving.http.status import ServerStatus
from serving.rollout.production_alias import ProductionAlias
from serving.rollout.reconciler import Reconciler
from serving.rollout.swap import Swap
from serving.rollout.swap_plan import SwapPlanner
from serving.router import Router
from serving.telemetry.engine_metrics import EngineMetrics
from serving.telemetry.loop_lag import LoopLag
from serving.telemetry.machine_metrics import add_machine_metrics
from serving.telemetry.metrics import GatewayMetrics
from serving.telemetry.request_log import RequestLog
from svc.engine.capabilities import Capabilities
from svc.engine.orphans import end_engine
from svc.engine.probes import engine_facts
from svc.engine.vllm.folders import socket_folder, state_folder, state_folders
from svc.engine.vllm.headroom import shortage
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.process import EngineProcess
from svc.registry.registry import Registry
from svc.settings import Settings
from svc.store.desired import Desired


@dataclass(frozen=True, slots=True)
class Parts:
    """What of a server runs, or is to be ended."""

    app: FastAPI
    request_log: RequestLog
    pool: EnginePool
    reconciler: Reconciler
    alias: ProductionAlias
    holdout: HoldoutRuns
    scores: LiveScores
    loop_lag: LoopLag


def assemble(
    settings: Settings,
    registry: Registry,
    store: Store,
    desired: Desired,
    capabilities: Capabilities,
    on_phase: Callable[[str], None],
) -> Parts:
    """All parts of a server of one model name.

    Args:
        desired: what it is to serve first.
        capabilities: of this device.
        on_phase: hears what an engine's start is doing.
    """
    return _Assembly(settings, registry, store, desired, capabilities, on_phase).parts()


class _Assembly:
    """What many parts get, and the parts one by one."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        store: Store,
        desired: Desired,
        capabilities: Capabilities,
        on_phase: Callable[[str], None],
    ) -> None:
        self._settings, self._registry, self._store = settings, registry, store
        self._desired, self._capabilities = desired, capabilities
        limits = settings.serve
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._collector = CollectorRegistry()
        self._metrics = GatewayMetrics(self._collector, exemplars=limits.exemplars)
        self._admission = Admission(
            max_running=limits.max_running,
            max_tokens=limits.max_running_tokens or limits.max_running * settings.engine.max_model_len,
            max_queued=limits.max_queued,
            queue_timeout_s=limits.queue_timeout_s,
        )
        self._router = Router(desired.name)
        self._verification = Verification(registry, store, partial(engine_facts, settings.engine, capabilities))
        self._slots = _Slots(settings, capabilities, desired.name)
        self._pool = self._engine_pool(on_phase)

    def parts(self) -> Parts:
        """Everything, put together."""
        store, metrics = self._store, self._metrics
        request_log = RequestLog(
            store, self._settings.request_log, on_stored=metrics.rows_stored, on_dropped=metrics.rows_dropped
        )
        alias = ProductionAlias(self._registry.tracking)
        reconciler = self._reconciler(alias)
        holdout, scores = self._background()
        status = ServerStatus(store, reconciler, self._pool, self._admission, holdout)
        app = self._app(request_log, status)
        loop_lag = LoopLag(metrics.loop_lagged)
        return Parts(app, request_log, self._pool, reconciler, alias, holdout, scores, loop_lag)

    def _engine_pool(self, on_phase: Callable[[str], None]) -> EnginePool:
        def make(number: int, on_change: Callable[[Replica], None]) -> Replica:
            return Replica(number, partial(self._slots.engine, number), self._verification, on_change, on_phase)

        return EnginePool(
            make,
            orphans=self._slots,
            size=self._settings.engine.replicas,
            admission=self._admission,
            router=self._router,
            metrics=self._metrics,
            retire_timeout_s=self._settings.serve.retire_timeout_s,
        )

    def _reconciler(self, alias: ProductionAlias) -> Reconciler:
        limits, registry = self._settings.serve, self._registry
        planner = SwapPlanner(
            registry=registry,
            verification=self._verification,
            pool=self._pool,
            choice=limits.swap,
            shortage=lambda target: self._slots.shortage(registry.artifact(target.version, target.format)),
            patience_s=limits.drain_timeout_s,
        )
        swap = Swap(
            planner=planner,
            verification=self._verification,
            pool=self._pool,
            admission=self._admission,
            router=self._router,
            drain_timeout_s=limits.drain_timeout_s,
            retire_timeout_s=limits.retire_timeout_s,
        )
        return Reconciler(
            self._desired,
            store=self._store,
            pool=self._pool,
            swap=swap,
            router=self._router,
            metrics=self._metrics,
            alias=alias,
        )

    def _background(self) -> tuple[HoldoutRuns, LiveScores]:
        settings, pool = self._settings, self._pool
        off = unfit_engine(self._capabilities, settings.engine)
        scheduler = BackgroundScheduler(self._admission, pool, settings.holdout, off=off)
        holdout = HoldoutRuns(
            scheduler,
            pool=pool,
            registry=self._registry,
            store=self._store,
            metrics=self._metrics,
            facts=self._verification.facts,
            every_hours=settings.holdout.every_hours,
        )
        scores = LiveScores(
            scheduler,
            busy=lambda: holdout.under_way,
            pool=pool,
            registry=self._registry,
            store=self._store,
            per_hour=settings.holdout.scored_per_hour if settings.request_log.content_share else 0,
        )
        return holdout, scores

    def _app(self, request_log: RequestLog, status: ServerStatus) -> FastAPI:
        settings = self._settings
        add_machine_metrics(self._collector, settings.home, self._capabilities, settings.engine)
        engine_metrics = EngineMetrics(self._pool.sources)
        self._collector.register(engine_metrics)
        gateway = Gateway(
            lease=self._pool.lease,
            admission=self._admission,
            router=self._router,
            metrics=self._metrics,
            request_log=request_log,
            settings=settings.serve,
            buffers=AnswerBuffers(
                max_bytes=settings.serve.max_buffered_bytes, max_answer_bytes=settings.serve.max_answer_bytes
            ),
            context=settings.engine.max_model_len,
        )
        feedback = FeedbackIntake(self._store, request_log, self._metrics.feedback_given)
        return build_app(gateway, feedback=feedback, engine_metrics=engine_metrics, status=status.read)


@dataclass(frozen=True, slots=True)
class _Slots:
    """The places for engines of one home, by replica."""

    settings: Settings
    capabilities: Capabilities
    name: str

    def engine(self, number: int, model: Path) -> EngineProcess:
        return EngineProcess(self._spec(number, model), silence_s=self.settings.serve.request_timeout_s)

    def shortage(self, model: Path) -> str | None:
        return shortage(self._spec(0, model))

    def numbers(self) -> list[int]:
        return list(state_folders(self.settings.home))

    def end(self, number: int) -> None:
        end_engine(state_folder(self.settings.home, number))

    def _spec(self, number: int, model: Path) -> EngineSpec:
        return EngineSpec(
            model=model,
            served_name=self.name,
            runtime=socket_folder(self.settings.home, number),
            state=state_folder(self.settings.home, number),
            log=self.settings.home / "logs" / f"engine-{number}.log",
            cache=self.settings.home / "cache" / "vllm",
            capabilities=self.capabilities,
            settings=self.settings.engine,
        )
