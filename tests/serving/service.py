"""The gateway in front of a double of the engine, put together as the server does it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine as Store
from sqlalchemy import create_engine
from starlette.types import ASGIApp

from serving.admission.admission import Admission
from serving.admission.errors import EngineUnavailableError
from serving.admission.party import Party
from serving.admission.rate_limiter import RateLimiter
from serving.assembly import make_traces
from serving.engines.admitted_lease import AdmittedLease
from serving.engines.balancer import Lease, Leasing
from serving.engines.token_pace import TokenPace
from serving.http.administration import Administration
from serving.http.app import Application, build_app
from serving.http.authentication import Authentication
from serving.http.body_slots import BodySlots
from serving.http.connections import THROUGH_SOCKET, limited_protocol
from serving.http.delivery import AnswerBuffers
from serving.http.feedback import FeedbackIntake
from serving.http.inference import BeginTrace, Gateway
from serving.model_names import ModelNames
from serving.rollout.version_changes import VersionChanges
from serving.router import Backend, Router, Share
from serving.telemetry.deployment_metrics import DeploymentInstruments, DeploymentMetrics
from serving.telemetry.engine_metrics import EngineMetrics, EngineSource
from serving.telemetry.metrics import GatewayMetrics
from serving.telemetry.request_log import RequestLog
from svc.access.authenticator import Authenticator
from svc.access.usage_meter import UsageMeter
from svc.engine.vllm.client import EngineClient, socket_transport
from svc.engine.vllm.connection_pool import EngineConnections
from svc.identity.principal import Principal
from svc.registry.registry import Registry
from svc.settings import RequestLimits, RequestLogSettings, ServeSettings, TelemetrySettings
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


class Leases(Protocol):
    """Gives an engine for a request."""

    def __call__(self, model: str, *, without: Lease | None = None) -> AbstractAsyncContextManager[Lease]:
        """An engine for the body, and another one than `without`."""


@dataclass(frozen=True, slots=True)
class OneBackend:
    """A backend of which each part is given."""

    names: ModelNames
    admission: Admission
    leases: Leases
    context: int = CONTEXT
    checks: Callable[[str], Awaitable[None]] | None = None

    async def check(self, model: str) -> None:
        """Raises where a name means nothing, also where only the registry knows that."""
        if self.checks:
            await self.checks(model)

    def lease(self, model: str, *, without: Lease | None = None) -> AbstractAsyncContextManager[Lease]:
        """An engine for the body."""
        return self.leases(model, without=without)

    def admitted(
        self, model: str, tokens: int, party: Party, waiting: Callable[[], AbstractContextManager[None]]
    ) -> AbstractAsyncContextManager[Lease]:
        """An engine for the body, once admission lets the request run."""
        leasing = self.leases(model)
        if isinstance(leasing, Leasing):
            return AdmittedLease(self.admission, leasing, tokens, party, waiting)
        return _admitted(self.admission, tokens, party, leasing)


@asynccontextmanager
async def _admitted(
    admission: Admission, tokens: int, party: Party, leasing: AbstractAsyncContextManager[Lease]
) -> AsyncIterator[Lease]:
    async with admitted(admission, tokens, party), leasing as lease:
        yield lease


def application(
    backend: Backend,
    sources: Callable[[], Sequence[EngineSource]],
    *,
    metrics: GatewayMetrics,
    settings: ServeSettings,
    buffers: AnswerBuffers | None = None,
    request_log: RequestLog | None = None,
    begin_trace: BeginTrace | None = None,
    store: Store | None = None,
    limiter: RateLimiter | None = None,
    usage: UsageMeter | None = None,
    status: Callable[[], Mapping[str, Any]] = dict,
    authentication: Authentication | None = None,
    changes: VersionChanges | None = None,
) -> Application:
    """The application over one backend; rows are taken and not written where no request log is given."""
    store = store or create_engine("sqlite://")
    request_log = request_log or RequestLog(
        store, RequestLogSettings(), on_stored=lambda count: None, on_dropped=lambda reason, count: None
    )
    router = Router()
    router.serve(backend.names.name, [Share(backend)])
    gateway = Gateway(
        router=router,
        body_slots=BodySlots(settings.max_running + settings.max_queued),
        metrics=metrics,
        request_log=request_log,
        settings=settings,
        request_limits=RequestLimits(),
        buffers=buffers or AnswerBuffers(max_bytes=2**28),
        limiter=limiter or RateLimiter(),
        usage=usage or UsageMeter(store),
        begin_trace=begin_trace,
    )
    engine_metrics = EngineMetrics(sources)
    metrics.registry.register(engine_metrics)
    return build_app(
        gateway,
        feedback=FeedbackIntake(store, request_log, metrics.feedback_given),
        engine_metrics=engine_metrics,
        status=status,
        authentication=authentication or Authentication(Authenticator(store), on_failure=metrics.authentication_failed),
        administration=Administration(
            store, changes or VersionChanges(Registry(Path("/none"), AliasBook()), store, dict)
        ),
    )


@asynccontextmanager
async def closed(admission: Admission) -> AsyncIterator[None]:
    """The only engine is changed in the body, and takes requests again at its end."""
    async with admission.changing():
        admission.unavailable(None)
        try:
            yield
        finally:
            admission.available()


@asynccontextmanager
async def connections(socket: Path, *, silence_s: float) -> AsyncIterator[EngineConnections]:
    """Connections to an engine for the body."""
    with closing(EngineConnections(socket, silence_s=silence_s)) as engine:
        yield engine


class _ClientsProtocol(limited_protocol()):  # type: ignore[misc]
    """As `svc serve` has it for clients, who do not come through the socket in the home."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.app_state[THROUGH_SOCKET] = False


class Service:
    """Everything between a client and the engine.

    Args:
        folder: for sockets.
        store: where rows go; without one they are taken and not written.
        keeping: what is kept of each request.
        telemetry: where spans go; they are made of rows, so it needs a store too.
        limiter: holds keys to their limits.
        buffers: of answers; default: of the settings.
        settings: fields of ServeSettings that differ from the default.

    Attributes:
        principals: whose key each secret is; who sends none of them has no key.
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
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.limiter = limiter or RateLimiter()
        self.principals: dict[str, Principal] = {}
        self.store = store
        self.settings = ServeSettings(**settings)
        self.double = EngineDouble(name=NAME)
        self.pace = TokenPace()
        self.admission = Admission(
            max_running=self.settings.max_running,
            max_tokens=self.settings.max_running_tokens or self.settings.max_running * CONTEXT,
            max_queued=self.settings.max_queued,
            queue_timeout_s=self.settings.queue_timeout_s,
        )
        self.names = ModelNames(NAME, clock=lambda: 1_700_000_000.0)
        self.registry = CollectorRegistry()
        self.metrics = GatewayMetrics(self.registry)
        DeploymentMetrics(DeploymentInstruments(self.registry), NAME).watch_admission(
            lambda: self.admission.running, lambda: self.admission.queued
        )
        self.traces = make_traces(telemetry or TelemetrySettings(), self.metrics)
        self.request_log = RequestLog(
            store or create_engine("sqlite://"),
            keeping or RequestLogSettings(),
            on_stored=self.metrics.rows_stored,
            on_dropped=self.metrics.rows_dropped,
            spans=self.traces,
        )
        self.usage = UsageMeter(store or create_engine("sqlite://"))
        self.gateway_buffers = buffers or AnswerBuffers(max_bytes=self.settings.max_buffered_bytes)
        self.authenticator = Authenticator(store or create_engine("sqlite://"))
        self.authentication = KnownCallers(
            self.authenticator, self.principals, on_failure=self.metrics.authentication_failed
        )
        self.engine: SocketServer | None = None
        self.app: Application | None = None

    @asynccontextmanager
    async def run(self) -> AsyncIterator["Service"]:
        """Engine and application for the body of the `with`; version 1 is loaded."""
        socket = self.folder / "engine.sock"
        async with (
            running_engine(self.double, socket) as self.engine,
            EngineClient.over_socket(socket, NAME) as engine,
            connections(socket, silence_s=self.settings.request_timeout_s) as self.http,
        ):
            self.app = application(
                OneBackend(self.names, self.admission, self.lease),
                lambda: [EngineSource(engine, self.loaded, 0)],
                metrics=self.metrics,
                request_log=self.request_log,
                begin_trace=self.traces.begin if self.traces else None,
                settings=self.settings,
                buffers=self.gateway_buffers,
                store=self.store,
                limiter=self.limiter,
                usage=self.usage,
                status=lambda: {"served": str(self.names.served)},
                authentication=self.authentication,
            )
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
        """The engine holds a version from now on."""
        self.loaded = served
        self.names.serve(served)
        self.names.set_loaded({served})

    @asynccontextmanager
    async def lease(self, model: str, *, without: Lease | None = None) -> AsyncIterator[Lease]:
        """The one engine."""
        self.names.resolve(model)
        if without is not None:
            raise EngineUnavailableError("there is one engine")
        yield Lease(self.http, self.loaded, NAME, self.pace)

    @property
    def asgi(self) -> ASGIApp:
        """The application, which knows its callers' keys."""
        assert self.app is not None
        return self.app

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Calls the application without a server; answers come whole."""
        transport = httpx.ASGITransport(self.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client

    @asynccontextmanager
    async def socket_client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Calls the application through a real server, so that streams stream and connections break."""
        socket = self.folder / "gateway.sock"
        transport = socket_transport(socket, max_connections=None)
        async with (
            running(self.asgi, socket, _ClientsProtocol),
            httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client,
        ):
            yield client

    def count(self, name: str, **labels: str) -> float:
        """The value of a sample; 0 where it does not exist."""
        return self.registry.get_sample_value(name, labels) or 0.0
