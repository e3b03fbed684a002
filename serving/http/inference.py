"""The data plane: one request from its first byte to the last byte of its answer.

read -> route -> reserve -> load the adapter -> admit -> resolve -> forward -> answer. Bytes pass through as they came,
with these exceptions: the model's name on the way in, an adapter's private name on the way out, and of a stream the
chunk with token counts, for clients that did not ask for it.

The answer's head is sent with the first complete event, not before: until then a failure can have its own status. What
a client does not take at once waits for it in a buffer (serving.http.delivery), outside admission: the engine is done.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.admission.errors import EngineUnavailableError
from serving.admission.rate_limiter import RateLimiter
from serving.engines.balancer import Lease
from serving.engines.transport import EngineCall, EngineUnreachableError
from serving.http.authentication import caller_of, principal_of
from serving.http.body import ClientGoneError, body_here, read_body
from serving.http.body_slots import BodySlot, BodySlots
from serving.http.delivery import AnswerBuffers, ClientSlowError, delivery_of
from serving.http.disconnect import cut_off, while_connected
from serving.http.error_answer import answer_error
from serving.http.errors import ApiError, api_error
from serving.http.event_stream import EventStream
from serving.http.key_account import KeyAccount
from serving.http.models import require_model
from serving.http.request_account import RequestAccount
from serving.protocols.error_code import ErrorCode
from serving.protocols.request import CompletionRequest, parse_request
from serving.protocols.route import Route
from serving.protocols.wire_formats import wire_format
from serving.router import Destination, Router
from serving.telemetry.metrics import UNKNOWN_MODEL, GatewayMetrics
from serving.telemetry.request_log import RequestLog
from serving.telemetry.traces.request_trace import RequestTrace
from svc.access.usage_meter import UsageMeter
from svc.engine.vllm.connection_pool import EngineAnswer
from svc.settings import RequestLimits, ServeSettings

BeginTrace = Callable[[Sequence[tuple[bytes, bytes]]], RequestTrace]


class Gateway:
    """Forwards completions to engines.

    Args:
        router: finds the backend for a request.
        body_slots: how many requests may come in at once.
        metrics: counts.
        request_log: keeps a row for each request.
        settings: the limits.
        request_limits: on the structure of one request.
        buffers: what of all answers waits for clients.
        limiter: holds keys to their limits.
        usage: counts what keys use.
        begin_trace: places a request in its trace, by its headers; None where there are no traces.
        clock: monotonic time, seconds.
    """

    def __init__(
        self,
        *,
        router: Router,
        body_slots: BodySlots,
        metrics: GatewayMetrics,
        request_log: RequestLog,
        settings: ServeSettings,
        request_limits: RequestLimits,
        buffers: AnswerBuffers,
        limiter: RateLimiter,
        usage: UsageMeter,
        begin_trace: BeginTrace | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.router = router
        self.body_slots = body_slots
        most = max(1, settings.max_queued)
        self.adapter_slots = BodySlots(most, "waiting for adapters")
        self.production_slots = BodySlots(most, "waiting for the adapter of the version in production")
        self.metrics = metrics
        self.request_log = request_log
        self.settings = settings
        self.request_limits = request_limits
        self.clock = clock
        self.buffers = buffers
        self.limiter = limiter
        self.usage = usage
        self.begin_trace = begin_trace

    def endpoint(self, route: Route) -> ASGIApp:
        """The ASGI application for one path."""
        return _Endpoint(self, route)


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """An object rather than a function, which Starlette would wrap in its request machinery."""

    gateway: Gateway
    route: Route

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[object, object, None]:
        return Exchange(self.gateway, self.route, scope, send).run(receive)


class Exchange:
    """One request and its answer."""

    def __init__(self, gateway: Gateway, route: Route, scope: Scope, send: Send) -> None:
        self._gateway = gateway
        self._route = route
        self._format = wire_format(route)
        self._scope = scope
        self._principal = principal_of(scope)
        self._asgi_send = send
        self._delivery = delivery_of(scope, send, gateway.buffers)
        self.account = RequestAccount(
            route,
            scope["state"],
            metrics=gateway.metrics,
            request_log=gateway.request_log,
            key=KeyAccount(self._principal, gateway.limiter, gateway.usage, gateway.metrics),
            trace=gateway.begin_trace(scope["headers"]) if gateway.begin_trace else None,
            clock=gateway.clock,
        )

    async def run(self, receive: Receive) -> None:
        """Answers, with an error where it must be."""
        settings, account = self._gateway.settings, self.account
        try:
            body = body_here(self._scope, max_bytes=settings.max_body_bytes)
            if body is None:
                peer = self._scope.get("client")
                with self._gateway.body_slots.reading(peer[0] if peer else ""):
                    body = await read_body(self._scope, receive, max_bytes=settings.max_body_bytes)
            account.body_read(len(body))
            account.key.reserve_request()
            request = parse_request(body, self._route, self._gateway.request_limits)
            account.parsed(request)
            del body
            await while_connected(self._scope, receive, self._answer(request))
        except ClientGoneError:
            if not self._delivered:
                account.failed(ErrorCode.CLIENT_GONE)
        except ClientSlowError:
            account.failed(ErrorCode.CLIENT_SLOW)
            await cut_off(self._scope, receive)
        except asyncio.CancelledError:
            if not self._delivered:
                account.failed(ErrorCode.ENGINE_DIED)  # the server ends, and with it the engine
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: api_error logs what is unexpected
            await self._fail(api_error(error), receive)
        finally:
            account.end()

    async def _answer(self, request: CompletionRequest) -> None:
        self.account.model = self._gateway.router.served_name(request.model) or UNKNOWN_MODEL
        require_model(self._gateway.router, self._principal, request.model)
        to = self._gateway.router.find(request.model, request.who)
        await to.backend.check(to.model)
        self._scope["state"]["version"] = (served := to.backend.names.served) and served.version
        # Delivered outside admission: the engine is done with it, and a client that reads slowly keeps no place.
        self.account.work = work = request.work(to.backend.context)
        self._scope["state"]["reservation"] = self.account.key.reserve(request, work, self.account.model)
        began = self._gateway.clock()
        async with (
            self._delivery,
            to.backend.admitted(
                to.model, work, self.account.key.party, lambda: self._waiting_for_adapter(to)
            ) as engine,
        ):
            self.account.admitted(self._gateway.clock() - began)
            try:
                await self._forward(engine, request)
            except EngineUnreachableError as error:
                await self._forward_to_another(to, engine, request, error)

    def _waiting_for_adapter(self, to: Destination) -> BodySlot:
        """A place among the requests that wait for adapters; those of versions in production have their own."""
        names, gateway = to.backend.names, self._gateway
        in_production = names.served is not None and names.resolve(to.model) in (None, names.served.version)
        slots = gateway.production_slots if in_production else gateway.adapter_slots
        return slots.reading(caller_of(self._scope))

    async def _forward_to_another(
        self, to: Destination, engine: Lease, request: CompletionRequest, refused: EngineUnreachableError
    ) -> None:
        """Once: where that one takes no connection either, something else is wrong."""
        try:
            async with to.backend.lease(to.model, without=engine) as other:
                await self._forward(other, request)
        except EngineUnavailableError:
            raise refused from None

    async def _forward(self, engine: Lease, request: CompletionRequest) -> None:
        """Asks the engine, and hands its answer to the delivery."""
        payload = request.payload(engine.engine_model)
        account = self.account
        account.served_by(engine.served, engine.pace)
        lines = account.trace.header_lines if account.trace else ""
        call = EngineCall(engine.http, self._route.value, payload, account.request_id, lines, engine.show)
        async with call as answer:
            if answer.is_event_stream:
                between_tokens = self._gateway.metrics.between_tokens(engine.served)
                usage = request.wants_usage
                stream = EventStream(
                    account,
                    self._delivery,
                    self._format,
                    self._begin,
                    between_tokens,
                    wants_usage=usage,
                    show=engine.show,
                )
                await stream.forward(answer)
            else:
                await self._take_whole(answer, engine)

    async def _take_whole(self, answer: EngineAnswer, engine: Lease) -> None:
        parts: list[bytes] = []
        while part := answer.take_some() or await answer.read_some():
            self._delivery.reserve(len(part))
            parts.append(part)
            if answer.is_taken:
                break
        account = self.account
        account.heard()
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        if engine.show is not None:
            size, body = len(body), engine.show(body)
            self._delivery.give_back(size - len(body))
        account.keep(body)
        if reason := self._format.finish_reason(body):
            account.finished(reason)
        if usage := self._format.usage(body):
            account.used(usage)
        account.completed()
        self._begin("application/json", len(body))
        self._delivery.put(body)

    def _begin(self, content_type: str, length: int | None = None) -> None:
        """Begins a good answer."""
        caching = b"cache-control: no-cache\r\n" if length is None else b""
        headers = b"content-type: %b\r\nx-svc-overhead-ms: %.2f\r\n%b" % (
            content_type.encode("latin-1"),
            self.account.begin() * 1000,
            caching,
        )
        self._delivery.start(headers, length=length)

    async def _fail(self, error: ApiError, receive: Receive) -> None:
        """Answers with an error; within a stream with an event, and without the one that ends a good answer."""
        self.account.failed(error.code)
        if not self.account.begun:
            self.account.status, self.account.begun = error.status, True
            await answer_error(error, self._scope, receive, self._asgi_send)
            return
        try:
            await self._delivery.send_last(self._format.error_event(error.body(self._route)))
        except ClientSlowError:
            await cut_off(self._scope, receive)

    @property
    def _delivered(self) -> bool:
        """All of the answer was handed over: OpenAI's client closes the connection once it reads the last event."""
        return self.account.complete and not self._delivery.pending
