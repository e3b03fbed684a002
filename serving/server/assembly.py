"""Builds the components of one server, without starting them, and passes them their dependencies explicitly."""

import asyncio
import platform
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, disable_created_metrics
from sqlalchemy import Engine as Store

from serving.access.authenticator import Authenticator
from serving.access.usage_meter import UsageMeter
from serving.admission.rate_limiter import RateLimiter
from serving.background.webhook import Webhook
from serving.batches.batch_requests import BatchRequests
from serving.batches.batch_run import BatchContext
from serving.batches.batch_runner import BatchRunner
from serving.batches.routes import Batches
from serving.engines.slots import EngineSlots, MakeSlots
from serving.feedback.routes import FeedbackIntake
from serving.files.checks import FileChecks
from serving.files.cleanup import run_cleanup
from serving.files.client_files import ClientFiles
from serving.files.routes import Files
from serving.files.upload_routes import Uploads
from serving.files.uploading import Uploading
from serving.files.uploads import ClientUploads
from serving.fine_tuning.creation import JobCreation
from serving.fine_tuning.results import JobResults
from serving.fine_tuning.routes import FineTuning
from serving.fine_tuning.worker import JobWorker
from serving.gateway.authentication import Authentication
from serving.gateway.delivery import AnswerBuffers
from serving.gateway.inference import Gateway, completion_endpoints
from serving.http.body_slots import BodySlots
from serving.models.deployment_builder import DeploymentBuilder
from serving.models.deployments import Deployments, OnFailure, OnReady
from serving.models.fine_tuned_models import PREFIXES, FineTunedModels, Loader
from serving.models.retention import Retention
from serving.models.router import Router
from serving.rollout.initial_state import servable_targets
from serving.rollout.leadership import EVERYTHING, Leadership
from serving.rollout.version_changes import VersionChanges
from serving.server.administration import Administration
from serving.server.app import Application, build_app
from serving.store_changes.change_listener import ChangeListener
from serving.store_changes.changes import Changes
from serving.store_changes.sqlite_listener import SqliteListener
from serving.telemetry.deployment_metrics import DeploymentInstruments
from serving.telemetry.drift_features import FeatureProcess
from serving.telemetry.engine_metrics import EngineMetrics, EngineSource
from serving.telemetry.loop_lag import watch_loop_lag
from serving.telemetry.machine_metrics import add_machine_metrics
from serving.telemetry.metrics import GatewayMetrics
from serving.telemetry.request_log import RequestLog
from serving.telemetry.usage_writer import UsageWriter
from svc.engine.device import DeviceCapabilities
from svc.registry.registry import Registry
from svc.remote.listening import is_loopback
from svc.settings.monitoring import TelemetrySettings
from svc.settings.settings import Settings
from svc.store.database import is_sqlite
from svc.store.requests import Dropped

MAX_BUFFERED_BYTES = 256 * 2**20
"""Memory limit for all answers that are waiting for slow clients. The limit is enough for sixteen answers of maximum
size, and is a small fraction of the memory on a machine that runs an engine."""

if TYPE_CHECKING:
    from serving.telemetry.traces.traces import Traces


@dataclass(frozen=True, slots=True)
class GatewayParts:
    """The application that serves clients, along with the components that the server must run or close for it.

    Attributes:
        draining: event to set when the server starts to drain, so that load balancers stop sending requests.
    """

    app: Application
    draining: asyncio.Event
    files: ClientFiles
    request_log: RequestLog
    usage_writer: UsageWriter
    job_creation: JobCreation
    file_checks: FileChecks
    clean_up_files: Callable[[], Coroutine[Any, Any, None]]
    batch_requests: BatchRequests
    traces: "Traces | None"


@dataclass(frozen=True, slots=True)
class Parts:
    """The components of a server that must be run or closed.

    Attributes:
        authenticator: loads the keys from the store; they must be loaded before the first request.
        leadership: this server's leases, which must be released when the server stops.
        works: coroutine functions that must run while the server runs.
        job_worker: runs fine-tuning jobs; its coroutine is one of `works`. None if this server runs no jobs.
    """

    gateway: GatewayParts
    deployments: Deployments
    authenticator: Authenticator
    leadership: Leadership
    works: Sequence[Callable[[], Coroutine[Any, Any, None]]]
    job_worker: JobWorker | None = None


def assemble(
    settings: Settings,
    registry: Registry,
    store: Store,
    capabilities: DeviceCapabilities,
    *,
    on_phase: Callable[[str], None],
    on_ready: OnReady,
    on_failure: OnFailure,
    make_slots: MakeSlots = EngineSlots,
) -> Parts:
    """Create all components of a server. The models to serve are passed later, to `Deployments.run`.

    Args:
        capabilities: capabilities of this device.
        on_phase: called with each phase of an engine's startup.
        on_ready: called with each version as soon as it is being served.
        on_failure: called with the reason why a model cannot be served.
        make_slots: function that returns the object that starts and finds engines.

    Raises:
        SettingsError: a setting refers to a file that cannot be used.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]
    collector = CollectorRegistry()
    metrics = GatewayMetrics(collector)
    add_machine_metrics(collector, settings.home, capabilities, settings.engine)
    router = Router()
    slots = make_slots(settings, registry, capabilities, lambda: router.served)
    store_changes = Changes()
    leadership = Leadership(
        store,
        store_changes,
        f"{platform.node()}:{settings.serve.port}",
        lambda: [each.name for each in deployments.all],
    )
    builder = DeploymentBuilder(
        settings, registry, store, store_changes, leadership, slots, metrics, DeploymentInstruments(collector), on_phase
    )
    deployments = Deployments(
        build=builder.build,
        router=router,
        slots=slots,
        store=store,
        changes=store_changes,
        leadership=leadership,
        registered=lambda: [name for name in registry.names() if not name.startswith(PREFIXES)],  # others' models
        on_ready=on_ready,
        on_failure=on_failure,
        server=leadership.server,
        loaded_idle_s=settings.fine_tuning.idle_s,
    )
    authenticator = Authenticator(store)
    authentication = Authentication(
        authenticator, keys_needed=not is_loopback(settings.serve.host), on_failure=metrics.authentication_failed
    )
    gateway = assemble_gateway(
        settings,
        store,
        router,
        metrics,
        authentication,
        limiter=RateLimiter(authenticator.principal),
        buffers=AnswerBuffers(max_bytes=MAX_BUFFERED_BYTES),
        changes=VersionChanges(registry, store, deployments.served, settings.model_settings),
        store_changes=store_changes,
        sources=lambda: [source for each in deployments.all for source in each.pool.sources()],
        status=deployments.status,
        server=leadership.server,
        loader=Loader(
            partial(servable_targets, registry),
            deployments.load,
            patience_s=settings.serve.queue_timeout_s,
            max_waiting=max(1, settings.serve.max_queued),
        ),
    )
    leads = partial(leadership.leads, EVERYTHING)
    webhooks = [Webhook.of(each, store, store_changes, metrics.webhooks_ended, leads) for each in settings.webhooks]
    batches = BatchContext(
        store,
        gateway.files,
        settings.home / "batches",
        gateway.batch_requests.ask,
        partial(leadership.lease, EVERYTHING),
        settings.batches.concurrency,
    )
    works: list[Callable[[], Coroutine[Any, Any, None]]] = [
        partial(watch_loop_lag, metrics.loop_lagged),
        gateway.usage_writer.run,
        gateway.file_checks.run,
        gateway.clean_up_files,
        leadership.run,
        partial(authenticator.follow, store_changes),
        BatchRunner(batches, store_changes, leads, deployments.looked.wait).run,
        *(webhook.run for webhook in webhooks),
    ]
    if settings.fine_tuning.bases:
        works.append(gateway.job_creation.run)
    worker = make_job_worker(settings, registry, store, gateway.files, store_changes)
    if worker is not None:
        works.append(worker.run)
    retention = Retention(
        store=store,
        batches_days=settings.batches.max_age_days,
        jobs_days=settings.fine_tuning.max_age_days,
        worker=None if worker is None else worker.id,
        registered=registry.names,
    )
    works.append(retention.run)
    listener = SqliteListener if is_sqlite(store) else ChangeListener
    works.append(listener(store, store_changes).run)
    return Parts(gateway, deployments, authenticator, leadership, works, worker)


def make_job_worker(
    settings: Settings, registry: Registry, store: Store, files: ClientFiles, changes: Changes
) -> JobWorker | None:
    """Return the worker that runs fine-tuning jobs on this machine, or None if the settings disable it.

    Without a worker, for example after `fine_tuning.bases` has been emptied, existing jobs remain in the queue.
    """
    tuning = settings.fine_tuning
    if not tuning.bases or not tuning.worker:
        return None
    results = JobResults(store, files, registry, settings.home / "jobs", tuning.organization)
    return JobWorker(store, settings, files, changes, complete=results.complete)


def assemble_gateway(
    settings: Settings,
    store: Store,
    router: Router,
    metrics: GatewayMetrics,
    authentication: Authentication,
    *,
    limiter: RateLimiter,
    buffers: AnswerBuffers,
    changes: VersionChanges,
    store_changes: Changes,
    sources: Callable[[], Sequence[EngineSource]],
    status: Callable[[], Mapping[str, Any]],
    server: str = "",
    loader: Loader | None = None,
) -> GatewayParts:
    """Create an application and its components. The application forwards clients' requests to the router's backends.

    Args:
        changes: object that writes the desired versions.
        store_changes: notifications about changes in the store.
        sources: function that returns the engines whose metrics are shown.
        status: function that returns the JSON values of /svc/status.
        server: id of the server; empty if no other server can use the store.
        loader: starts engines for fine-tuned models that clients request, or None to start none.
    """
    limits, traces = settings.serve, make_traces(settings.telemetry, metrics)
    lose_features = partial(metrics.rows_dropped, Dropped.FEATURES)
    request_log = RequestLog(
        store,
        settings.request_log,
        on_stored=metrics.rows_stored,
        on_dropped=metrics.rows_dropped,
        spans=traces,
        features=FeatureProcess(settings, on_dropped=lose_features) if settings.request_log.features else None,
    )
    engine_metrics = EngineMetrics(sources)
    metrics.registry.register(engine_metrics)
    usage = UsageMeter(store)
    gateway = Gateway(
        router=router,
        body_slots=BodySlots(limits.max_running + limits.max_queued),
        metrics=metrics,
        request_log=request_log,
        settings=limits,
        request_limits=settings.request_limits,
        buffers=buffers,
        limiter=limiter,
        usage=usage,
        fine_tuned=FineTunedModels(store, router, settings.fine_tuning.organization, loader=loader),
        begin_trace=traces.begin if traces else None,
    )
    files = ClientFiles.of(settings, store)
    client_uploads = ClientUploads(store, settings.home / "uploads", files)
    uploading = Uploading(settings.home, min_free_bytes=int(settings.files.min_free_gb * 2**30))
    file_checks = FileChecks(store, files)
    clean_up_files = partial(run_cleanup, files, client_uploads)
    job_creation = JobCreation(store, files, settings, store_changes)
    draining = asyncio.Event()
    app = build_app(
        gateway,
        feedback=FeedbackIntake(store, request_log, metrics.feedback_given),
        engine_metrics=engine_metrics,
        status=status,
        authentication=authentication,
        administration=Administration(store, changes, server),
        fine_tuning=FineTuning(store, settings, job_creation),
        batches=Batches(store, settings.batches, settings.files),
        files=Files(store, files, settings.files, uploading, file_checks.wake),
        uploads=Uploads(store, client_uploads, settings.files, uploading, file_checks.wake),
        draining=draining,
    )
    usage_writer = UsageWriter(store, usage, limiter.add_used_today, limiter.add_used_elsewhere)
    batch_requests = BatchRequests(completion_endpoints(gateway), authentication.valid_principal)
    return GatewayParts(
        app,
        draining,
        files,
        request_log,
        usage_writer,
        job_creation,
        file_checks,
        clean_up_files,
        batch_requests,
        traces,
    )


def make_traces(settings: TelemetrySettings, metrics: GatewayMetrics) -> "Traces | None":
    """Return the trace sender, or None (without loading OpenTelemetry) if no receiver is configured.

    Raises:
        SettingsError: an environment variable that holds headers for the receiver is malformed.
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
