"""The data plane: handles each completion request from its first byte to the last byte of its answer.

read -> route -> reserve -> load the adapter -> admit -> resolve -> forward -> answer. Bytes pass through unchanged,
with three exceptions: the model's name on the way in, an adapter's private name on the way out, and the chunk with
token counts in a stream, which is dropped for clients that did not request it.

The response headers are sent with the first complete event, so that a failure before that event can still be answered
with an error status. Once the engine is done, the request releases its admission slot, even if the client has not read
all bytes. The rest waits in a buffer (serving.gateway.delivery).
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.access.usage_meter import UsageMeter
from serving.admission.errors import EngineUnavailableError
from serving.admission.rate_limiter import RateLimiter
from serving.batches.batch_requests import is_repeated
from serving.engines.balancer import Lease
from serving.engines.transport import EngineCall, EngineUnreachableError
from serving.gateway.delivery import AnswerBuffers, ClientSlowError, Delivery
from serving.gateway.event_stream import EventStream
from serving.gateway.request import Request
from serving.http.body import ClientGoneError, read_body
from serving.http.body_slots import BodySlots
from serving.http.disconnect import cut_off, while_connected
from serving.http.error_answer import answer_error
from serving.http.errors import ApiError, api_error
from serving.http.request_state import request_state
from serving.models.fine_tuned_models import PREFIXES, FineTunedModels
from serving.models.router import Destination, Router
from serving.models.routes import require_model
from serving.protocols.error_code import ErrorCode
from serving.protocols.request import CompletionRequest, InvalidRequestError, parse_request
from serving.protocols.route import Route
from serving.protocols.wire_formats import wire_format
from serving.telemetry.metrics import UNKNOWN_MODEL, GatewayMetrics
from serving.telemetry.request_log import RequestLog
from serving.telemetry.traces.request_trace import RequestTrace
from svc.engine.vllm.connection_pool import EngineAnswer
from svc.settings.serve import RequestLimits, ServeSettings

BeginTrace = Callable[[Sequence[tuple[bytes, bytes]]], RequestTrace]


@dataclass(slots=True, kw_only=True)
class Gateway:
    """Forwards completion requests to engines.

    Attributes:
        router: finds the backend for a request.
        body_slots: limit on request bodies that are being received concurrently.
        metrics: counts requests.
        request_log: stores a row for each request.
        settings: the settings that contain the limits on bodies and queues.
        request_limits: limits on the structure of one request.
        buffers: memory for answers that are waiting for their clients.
        limiter: enforces the limits on API keys.
        usage: counts usage per key.
        fine_tuned: finds fine-tuned models.
        begin_trace: function that starts a request's trace, or continues the trace named in its headers, and returns
            the trace. None if tracing is off.
        clock: function that returns monotonic time, in seconds.
        adapter_slots: limit on requests that are waiting for adapters that are not in production.
        production_slots: limit on requests that are waiting for an adapter in production.
    """

    router: Router
    body_slots: BodySlots
    metrics: GatewayMetrics
    request_log: RequestLog
    settings: ServeSettings
    request_limits: RequestLimits
    buffers: AnswerBuffers
    limiter: RateLimiter
    usage: UsageMeter
    fine_tuned: FineTunedModels
    begin_trace: BeginTrace | None = None
    clock: Callable[[], float] = time.perf_counter
    adapter_slots: BodySlots = field(init=False)
    production_slots: BodySlots = field(init=False)

    def __post_init__(self) -> None:
        max_waiting = max(1, self.settings.max_queued)
        self.adapter_slots = BodySlots(max_waiting, "waiting for adapters")
        self.production_slots = BodySlots(max_waiting, "waiting for the production version's adapter")


def completion_endpoints(gateway: Gateway) -> dict[str, ASGIApp]:
    """Return the ASGI applications that handle completions, keyed by path."""
    return {route.value: _Endpoint(gateway, route) for route in Route}


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """The ASGI application for one completion path.

    It is a class because Starlette would wrap a function in its request machinery.
    """

    gateway: Gateway
    route: Route

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[object, object, None]:
        return Exchange(self.gateway, self.route, scope, send).run(receive)


class Exchange:
    """Handles a single request and sends its response."""

    def __init__(self, gateway: Gateway, route: Route, scope: Scope, send: Send) -> None:
        self._gateway = gateway
        self._route = route
        self._format = wire_format(route)
        self._scope = scope
        self._state = request_state(scope)
        self._asgi_send = send
        self._delivery = Delivery(send, gateway.buffers, self._state.connection, self._state.caller)
        self.request = Request(
            route,
            self._state,
            metrics=gateway.metrics,
            request_log=gateway.request_log,
            limiter=gateway.limiter,
            usage_meter=gateway.usage,
            trace=gateway.begin_trace(scope["headers"]) if gateway.begin_trace else None,
            clock=gateway.clock,
        )

    async def run(self, receive: Receive) -> None:
        """Answer the request, or send an error if it fails."""
        settings, request = self._gateway.settings, self.request
        try:
            slot = partial(self._gateway.body_slots.reading, self._state.address)
            body = await read_body(self._state.headers, receive, max_bytes=settings.max_body_bytes, slot=slot)
            request.body_read(len(body))
            if not self._state.in_batch:
                request.count()
            completion = parse_request(body, self._route, self._gateway.request_limits)
            if self._state.in_batch and completion.stream:
                raise InvalidRequestError("'stream' is not supported in a batch", param="stream", expected="false")
            request.parsed(completion)
            del body
            await while_connected(self._state, self._answer(completion))
        except ClientGoneError:
            if not self._delivered:
                request.failed(ErrorCode.CLIENT_GONE)
        except ClientSlowError:
            request.failed(ErrorCode.CLIENT_SLOW)
            await cut_off(self._state.connection)
        except asyncio.CancelledError:
            if self._state.in_batch:
                request.withdrawn = True
            elif not self._delivered:
                request.failed(ErrorCode.ENGINE_DIED)  # the server stops, and the engine with it
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: api_error logs unexpected errors
            await self._fail(api_error(error), receive)
        finally:
            request.end()

    async def _answer(self, completion: CompletionRequest) -> None:
        router = self._gateway.router
        self.request.model = router.served_name(completion.model) or UNKNOWN_MODEL
        to = None
        if completion.model.startswith(PREFIXES):
            to = await self._gateway.fine_tuned.find(completion.model, self.request.principal)
        if to is None:
            require_model(router, self.request.principal, completion.model)
            to = router.find(completion.model, completion.user or completion.who)
            if self._state.in_batch:  # a rollout compares the answers to clients
                to = Destination(to.backend, completion.model)
        else:
            self.request.model = to.backend.names.name
        if to.assignment:
            self.request.assigned(to.assignment)
        await to.backend.check(to.model)
        served = to.backend.names.served
        self._state.version = to.version or (served.version if served else None)
        # Delivered outside admission: the engine is done, and a client that reads slowly holds no slot.
        self.request.work = completion.work(to.backend.context)
        if not self._state.in_batch:
            self.request.reserve()
        began = self._gateway.clock()
        async with (
            self._delivery,
            to.backend.admitted(
                to.model, completion.who, self.request.work, self.request.tenant, lambda: self._waiting_for_adapter(to)
            ) as engine,
        ):
            self.request.admitted(self._gateway.clock() - began)
            if self._state.in_batch:  # only now, because clients need the key's limits while it waits
                self.request.reserve_in_batch()
            try:
                await self._forward(engine, completion)
            except EngineUnreachableError as error:
                await self._forward_to_another(to, engine, completion, error)

    def _waiting_for_adapter(self, to: Destination) -> AbstractContextManager[None]:
        """Take a slot for a request that is waiting for an adapter. Versions in production have separate slots."""
        names, gateway = to.backend.names, self._gateway
        in_production = names.served is not None and names.resolve(to.model) in (None, names.served.version)
        slots = gateway.production_slots if in_production else gateway.adapter_slots
        return slots.reading(self._state.caller)

    async def _forward_to_another(
        self, to: Destination, engine: Lease, completion: CompletionRequest, refused: EngineUnreachableError
    ) -> None:
        """Retry a request on another engine after the first engine refused the connection.

        There is only one retry: a second refusal means that the fault does not lie with a single engine. If the engine
        of a rollout's candidate is unreachable, the production version answers.
        """
        try:
            async with to.backend.lease(completion.model, who=completion.who, without=engine) as other:
                await self._forward(other, completion)
        except EngineUnavailableError:
            raise refused from None

    async def _forward(self, engine: Lease, completion: CompletionRequest) -> None:
        """Send the request to the engine, and forward the engine's answer to the client."""
        payload = completion.payload(engine.engine_model)
        request = self.request
        request.served_by(engine.served, engine.pace)
        lines = request.trace.header_lines if request.trace else ""
        call = EngineCall(engine.http, self._route.value, payload, self._state.request_id, lines, engine.show)
        async with call as answer:
            if answer.is_event_stream:
                stream = EventStream(
                    request,
                    self._delivery,
                    self._format,
                    self._begin,
                    self._gateway.metrics.between_tokens(engine.served),
                    completion.wants_usage,
                    engine.show,
                )
                await stream.forward(answer)
            else:
                await self._take_whole(answer, engine)

    async def _take_whole(self, answer: EngineAnswer, engine: Lease) -> None:
        request = self.request
        body = await read_whole(answer, engine, self._delivery)
        request.answer_arrived()
        request.keep(body)
        if reason := self._format.finish_reason(body):
            request.finished(reason)
        if usage := self._format.usage(body):
            request.used(usage)
        request.completed()
        self._begin("application/json", len(body))
        self._delivery.put(body)

    def _begin(self, content_type: str, length: int | None = None) -> None:
        """Set the headers of a successful response, which are sent with its first part."""
        framing = (b"cache-control", b"no-cache") if length is None else (b"content-length", b"%d" % length)
        overhead = b"%.2f" % (self.request.begin() * 1000)
        self._delivery.start(
            [(b"content-type", content_type.encode("latin-1")), (b"x-svc-overhead-ms", overhead), framing]
        )

    async def _fail(self, error: ApiError, receive: Receive) -> None:
        """Respond with an error. If a stream has already begun, send an error event in place of its final event."""
        if self._state.in_batch and is_repeated(error):
            self.request.withdrawn = True
        else:
            self.request.failed(error.code)
        if self._state.in_batch or not self.request.begun:
            self.request.status, self.request.begun = error.status, True
            await answer_error(error, self._scope, receive, self._asgi_send)
            return
        try:
            await self._delivery.send_last(self._format.error_event(error.body(self._route)))
        except ClientSlowError:
            await cut_off(self._state.connection)

    @property
    def _delivered(self) -> bool:
        """Whether the whole answer has been sent, in which case a closed connection is not an error.

        OpenAI's client closes the connection as soon as it reads the last event.
        """
        return self.request.complete and not self._delivery.pending


async def read_whole(answer: EngineAnswer, engine: Lease, delivery: Delivery) -> bytes:
    """Read and return the body of an engine's response, reserving memory for it.

    Raises:
        AnswerTooLargeError, OverloadedError: the body is too large, or the buffers are full.
    """
    parts: list[bytes] = []
    while part := await answer.read_some():
        delivery.reserve(len(part))
        parts.append(part)
    body = b"".join(parts)
    if engine.show is None:
        return body
    shown = engine.show(body)
    delivery.give_back(len(body) - len(shown))
    return shown
