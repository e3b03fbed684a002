"""The gateway in front of an engine double, assembled as in the real server."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine as Store
from sqlalchemy import create_engine

from serving.access.authenticator import Authenticator
from serving.admission.admission import Admission
from serving.admission.errors import EngineUnavailableError
from serving.admission.rate_limiter import RateLimiter
from serving.admission.tenant import Tenant
from serving.engines.balancer import Lease
from serving.engines.model_names import ModelNames
from serving.engines.token_pace import TokenPace
from serving.gateway.authentication import Authentication
from serving.gateway.delivery import AnswerBuffers
from serving.http.connections import ClientProtocol, watched
from serving.models.router import Backend, Router
from serving.rollout.version_changes import VersionChanges
from serving.server.assembly import MAX_BUFFERED_BYTES, GatewayParts, assemble_gateway
from serving.store_changes.changes import Changes
from serving.telemetry.deployment_metrics import DeploymentInstruments, DeploymentMetrics
from serving.telemetry.engine_metrics import EngineSource
from serving.telemetry.metrics import GatewayMetrics
from svc.engine.client import EngineClient, engine_transport
from svc.engine.vllm.connection_pool import EngineConnections
from svc.identity.principal import Principal
from svc.registry.registry import Registry
from svc.settings.client_apis import FilesSettings, FineTuningSettings
from svc.settings.monitoring import RequestLogSettings, TelemetrySettings
from svc.settings.serve import ServeSettings
from svc.settings.settings import Settings
from svc.settings.storage import ArtifactSettings
from svc.version import Format, Target, VersionId
from tests.serving.admission.opened import admitted
from tests.serving.engine_double import EngineDouble, running_engine
from tests.serving.keyed import KnownCallers
from tests.serving.socket_server import SocketServer, running
from tests.serving.versions import AliasBook

NAME = "tuned"
CONTEXT = 2048
ONE = Target(VersionId(NAME, 1), Format.MERGED)
TWO = Target(VersionId(NAME, 2), Format.GPTQ)
CHAT: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "one two three"}]}
STREAM = {**CHAT, "stream": True}
CHAT_PATH = "/v1/chat/completions"


class Leases(Protocol):
    """Protocol for leasing an engine for a request."""

    def __call__(self, model: str, *, without: Lease | None = None) -> AbstractAsyncContextManager[Lease]:
        """Lease an engine other than `without` while the context is active."""


@dataclass(frozen=True, slots=True)
class OneBackend:
    """A backend whose components are passed in."""

    names: ModelNames
    admission: Admission
    leases: Leases
    context: int = CONTEXT

    async def check(self, model: str) -> None:
        """Accept every model name."""

    async def takes(self, version: VersionId) -> bool:
        """Return whether the version is the served one."""
        return self.names.served is not None and version == self.names.served.version

    def lease(self, model: str, *, who: str = "", without: Lease | None = None) -> AbstractAsyncContextManager[Lease]:
        """Lease an engine while the context is active."""
        return self.leases(model, without=without)

    @asynccontextmanager
    async def admitted(
        self, model: str, who: str, tokens: int, tenant: Tenant, waiting: Callable[[], AbstractContextManager[None]]
    ) -> AsyncIterator[Lease]:
        """Lease an engine after admission, while the context is active."""
        async with admitted(self.admission, tokens, tenant), self.leases(model) as lease:
            yield lease


def gateway(
    backend: Backend,
    settings: Settings,
    store: Store,
    metrics: GatewayMetrics,
    authentication: Authentication,
    *,
    limiter: RateLimiter | None = None,
    buffers: AnswerBuffers | None = None,
    sources: Callable[[], Sequence[EngineSource]] = list,
    status: Callable[[], Mapping[str, Any]] = dict,
    router: Router | None = None,
) -> GatewayParts:
    """Return the components that answer clients, as in `svc serve`, in front of one backend."""
    router = router or Router()
    router.serve(backend.names.name, backend)
    return assemble_gateway(
        settings,
        store,
        router,
        metrics,
        authentication,
        limiter=limiter or RateLimiter(),
        buffers=buffers or AnswerBuffers(max_bytes=MAX_BUFFERED_BYTES),
        changes=VersionChanges(Registry(settings.home / "models", AliasBook()), store, dict, settings.model_settings),
        store_changes=Changes(),
        sources=sources,
        status=status,
    )


@asynccontextmanager
async def closed(admission: Admission) -> AsyncIterator[None]:
    """Close admission for a change of the only engine while the context is active, then reopen it."""
    async with admission.changing():
        admission.unavailable(None)
        try:
            yield
        finally:
            admission.available()


@asynccontextmanager
async def connections(socket: Path, *, silence_s: float) -> AsyncIterator[EngineConnections]:
    """Keep connections to an engine open while the context is active."""
    with closing(EngineConnections(socket, silence_s=silence_s)) as engine:
        yield engine


class ClientsProtocol(ClientProtocol):
    """uvicorn's protocol, as in `svc serve`, for clients that do not connect through the socket in the home."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.connection.through_socket = False


class Service:
    """Everything between a client and the engine.

    Args:
        folder: folder for sockets.
        store: store for the rows; without a store they are accepted but not written.
        keeping: settings of the request log.
        telemetry: settings of traces; spans are built from rows, so a store is required as well.
        limiter: enforces the limits of keys.
        buffers: answer buffers; by default created from the settings.
        fine_tuning: settings of the fine-tuning API, which is off by default.
        files: limits of clients' files.
        artifacts: settings of the object store; none by default.
        settings: fields of ServeSettings that differ from the default.

    Attributes:
        principals: principals by key secret; all other requests have no key.
    """

    def __init__(
        self,
        folder: Path,
        *,
        store: Store | None = None,
        keeping: RequestLogSettings | None = None,
        telemetry: TelemetrySettings | None = None,
        limiter: RateLimiter | None = None,
        buffers: AnswerBuffers | None = None,
        fine_tuning: FineTuningSettings | None = None,
        files: FilesSettings | None = None,
        artifacts: ArtifactSettings | None = None,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.limiter = limiter or RateLimiter()
        self.principals: dict[str, Principal] = {}
        self.store = store
        self.double = EngineDouble(name=NAME)
        self.pace = TokenPace()
        limits = ServeSettings(**settings)
        self.admission = Admission(
            max_running=limits.max_running,
            max_tokens=limits.max_running * CONTEXT,
            max_queued=limits.max_queued,
            queue_timeout_s=limits.queue_timeout_s,
        )
        self.names = ModelNames(NAME, clock=lambda: 1_700_000_000.0)
        self.registry = CollectorRegistry()
        metrics = GatewayMetrics(self.registry)
        DeploymentMetrics(DeploymentInstruments(self.registry), NAME).watch_admission(
            lambda: self.admission.running,
            lambda: self.admission.queued,
            lambda: self.admission.batch_slots.running,
        )
        self.gateway_buffers = buffers or AnswerBuffers(max_bytes=MAX_BUFFERED_BYTES)
        store = store or create_engine("sqlite://")
        self.authenticator = Authenticator(store)
        self.authentication = KnownCallers(
            self.authenticator, self.principals, on_failure=metrics.authentication_failed
        )
        self.silence_s = limits.request_timeout_s
        parts = gateway(
            OneBackend(self.names, self.admission, self.lease),
            Settings(
                home=folder,
                serve=limits,
                request_log=keeping or RequestLogSettings(),
                telemetry=telemetry or TelemetrySettings(),
                fine_tuning=fine_tuning or FineTuningSettings(),
                files=files or FilesSettings(),
                artifacts=artifacts or ArtifactSettings(),
            ),
            store,
            metrics,
            self.authentication,
            limiter=self.limiter,
            buffers=self.gateway_buffers,
            sources=lambda: [EngineSource(self.engine_client, self.loaded, 0)],
            status=lambda: {"served": str(self.names.served)},
        )
        self.file_checks = parts.file_checks
        self.app, self.request_log = parts.app, parts.request_log
        self.usage_writer, self.traces = parts.usage_writer, parts.traces
        self.batch_requests = parts.batch_requests
        self.engine: SocketServer | None = None

    @asynccontextmanager
    async def run(self) -> AsyncIterator["Service"]:
        """Run the engine and the application with version 1 loaded while the context is active."""
        socket = self.folder / "engine.sock"
        async with (
            running_engine(self.double, socket) as self.engine,
            EngineClient.of(socket, NAME) as self.engine_client,
            connections(socket, silence_s=self.silence_s) as self.http,
        ):
            self.load(ONE)
            self.admission.available()
            if self.store is not None:
                self.request_log.start()
            yield self
            if self.store is not None:
                await asyncio.to_thread(self.request_log.close)
            if self.traces:
                await asyncio.to_thread(self.traces.close)

    def load(self, served: Target) -> None:
        """Set the version that the engine holds."""
        self.loaded = served
        self.names.serve(served)
        self.names.loaded = {served}

    @asynccontextmanager
    async def lease(self, model: str, *, without: Lease | None = None) -> AsyncIterator[Lease]:
        """Lease the only engine."""
        self.names.resolve(model)
        if without is not None:
            raise EngineUnavailableError("there is one engine")
        yield Lease(self.http, self.loaded, NAME, self.pace)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Yield a client of the application that needs no server and receives each response as a whole."""
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client

    @asynccontextmanager
    async def socket_client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Yield a client that reaches the application through a real server, with real streams and connections."""
        socket = self.folder / "gateway.sock"
        transport = engine_transport(socket, max_connections=None)
        async with (
            running(watched(self.app), socket, ClientsProtocol),
            httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client,
        ):
            yield client

    def count(self, name: str, **labels: str) -> float:
        """Return the value of a metric sample, or 0 if it does not exist."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def failed(self, reason: str, model: str = NAME, version: str = "1") -> float:
        """Return how many requests to a version failed for a reason."""
        return self.count("svc_request_errors_total", model=model, version=version, reason=reason)

    def failed_anywhere(self, reason: str) -> float:
        """Return how many requests failed for a reason, counting both versions and requests without a version."""
        versions = ((NAME, "1"), (NAME, "2"), (NAME, ""), ("unknown", ""))
        return sum(self.failed(reason, model, version) for model, version in versions)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error in a response, after checking its fields."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)
