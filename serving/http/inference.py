"""The data plane: one request from its first byte to the last byte of its answer.

read -> route -> reserve -> admit -> resolve -> forward -> answer. Bytes pass through as they came, with two exceptions:
the model's name on the way in, and on the way out of a stream the chunk with token counts, for clients that did not ask
for it.

The answer's head is sent with the first complete event, not before: until then a failure can have its own status. What
a client does not take at once waits for it in a buffer (serving.http.delivery), outside admission: the engine is done.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.admission.errors import EngineUnavailableError
from serving.admission.rate_limiter import RateLimiter
from serving.engines.balancer import Lease
from serving.engines.transport import EngineCall, EngineDiedError, EngineUnreachableError, refusal
from serving.http.authentication import principal_of
from serving.http.body import ClientGoneError, read_body
from serving.http.body_slots import BodySlots
from serving.http.delivery import AnswerBuffers, ClientSlowError, delivery_of
from serving.http.disconnect import cut_off, while_connected
from serving.http.error_answer import answer_error
from serving.http.errors import ApiError, api_error
from serving.http.key_account import KeyAccount
from serving.http.models import require_model
from serving.protocols.error_code import ErrorCode
from serving.protocols.outcome import outcome_of
from serving.protocols.request import CompletionRequest, parse_request
from serving.protocols.route import Route
from serving.protocols.server_sent_events import EventSplitter
from serving.protocols.wire_formats import TOKEN, Usage, wire_format
from serving.router import Destination, Router
from serving.telemetry.content import Content
from serving.telemetry.metrics import CLIENT_GONE_STATUS, UNKNOWN_MODEL, GatewayMetrics
from serving.telemetry.request_log import RequestLog
from serving.telemetry.traces.request_trace import RequestTrace
from svc.access.usage_meter import UsageMeter
from svc.engine.vllm.connection_pool import EngineAnswer
from svc.errors import EngineError
from svc.settings import ServeSettings
from svc.store.requests import RequestRecord, hash_user
from svc.version import Target

BeginTrace = Callable[[Sequence[tuple[bytes, bytes]]], RequestTrace]


class Gateway:
    """Forwards completions to engines.

    Args:
        router: finds the backend for a request.
        body_slots: how many requests may come in at once.
        metrics: counts.
        request_log: keeps a row for each request.
        settings: the limits.
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
        buffers: AnswerBuffers,
        limiter: RateLimiter,
        usage: UsageMeter,
        begin_trace: BeginTrace | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.router = router
        self.body_slots = body_slots
        self.metrics = metrics
        self.request_log = request_log
        self.settings = settings
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(self.gateway, self.route, scope, send)
        try:
            await exchange.run(receive)
        finally:
            exchange.account()


class Exchange:
    """One request and its answer."""

    def __init__(self, gateway: Gateway, route: Route, scope: Scope, send: Send) -> None:
        self._gateway = gateway
        self._route = route
        self.format = wire_format(route)
        self._scope = scope
        self._principal = principal_of(scope)
        self._asgi_send = send
        self._delivery = delivery_of(scope, send, gateway.buffers, gateway.settings.client_timeout_s)
        self._clock = gateway.clock
        self._arrived = datetime.now(UTC)
        self._trace = gateway.begin_trace(scope["headers"]) if gateway.begin_trace else None
        self._own_s: float | None = None  # the gateway's time before the answer began
        self._started = self._clock()
        self._model = UNKNOWN_MODEL
        self._served: Target | None = None
        self._status: int | None = None
        self._reason: ErrorCode | None = None
        self._request: CompletionRequest | None = None
        self._usage: Usage | None = None
        self._asked = 0.0  # when the engine was
        self._place_s = self._engine_s = 0.0  # waited for a place, and for the beginning of the engine's answer
        self._first_token_s: float | None = None
        self._finish_reason: str | None = None
        self._content: Content | None = None  # what passes, where it is to be kept
        self._key = KeyAccount(principal_of(scope), gateway.limiter, gateway.usage, gateway.metrics)
        self.complete = False
        """The engine has given all of the answer."""

    async def run(self, receive: Receive) -> None:
        """Answers, with an error where it must be."""
        settings = self._gateway.settings
        try:
            peer = self._scope.get("client")
            with self._gateway.body_slots.reading(peer[0] if peer else ""):
                body = await read_body(
                    self._scope, receive, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s
                )
            self._started = self._clock()
            self._request = request = parse_request(body, self._route)
            self._key.body_bytes = len(body)
            del body
            if self._gateway.request_log.wants_content():
                self._content = Content(self._route, request.members)
            await while_connected(self._scope, receive, self._answer(request))
        except ClientGoneError:
            if not self._delivered:
                self._failed(ErrorCode.CLIENT_GONE)
        except ClientSlowError:
            self._failed(ErrorCode.CLIENT_SLOW)
            await cut_off(self._scope, receive)
        except asyncio.CancelledError:
            if not self._delivered:
                self._failed(ErrorCode.ENGINE_DIED)  # the server ends, and with it the engine
            raise
        except Exception as error:  # noqa: BLE001 - the boundary: api_error logs what is unexpected
            await self._fail(api_error(error), receive)

    def account(self) -> None:
        """Counts the request, settles with its key and keeps its row, once its end is known."""
        status = CLIENT_GONE_STATUS if self._status is None else self._status
        seconds, served, usage, request = self.elapsed(), self._served, self._usage, self._request
        self._gateway.metrics.request_ended(
            served, self._route, status, seconds, self._request_id, reason=self._reason, model=self._model
        )
        self._key.settle(served, self._reason, usage)
        record = RequestRecord(
            request_id=self._request_id,
            client_request_id=self._scope["state"].get("client_request_id"),
            started_at=self._arrived,
            model=served.version.name if served else self._model,
            version=served.version if served else None,
            format=served.format if served else None,
            route=self._route.value,
            status=status,
            seconds=seconds,
            reason=self._reason.value if self._reason else None,
            outcome=outcome_of(self._reason),
            key_id=self._key.key_id,
            finish_reason=self._finish_reason,
            first_token_seconds=self._first_token_s,
            tokens_in=usage.prompt if usage else None,
            tokens_out=usage.completion if usage else None,
            temperature=request.temperature if request else None,
            max_tokens=request.max_tokens if request else None,
            user_hash=hash_user(request.user) if request and request.user else None,
        )
        if trace := self._trace:
            # A name that no version answers to is the client's own text.
            model = request.model if request and served else self._model
            trace.end(
                model=model,
                stream=request.stream if request else None,
                queue_s=self._place_s,
                overhead_s=self._own_s,
            )
        traced = trace if trace and trace.sampled else None
        self._gateway.request_log.add(record, self._content if served else None, traced)

    async def _answer(self, request: CompletionRequest) -> None:
        self._model = self._gateway.router.served_name(request.model) or UNKNOWN_MODEL
        require_model(self._gateway.router, self._principal, request.model)
        to = self._gateway.router.find(request.model, request.who)
        await to.backend.check(to.model)
        self._scope["state"]["version"] = (served := to.backend.names.served) and served.version
        # Delivered outside admission: the engine is done with it, and a client that reads slowly keeps no place.
        work = request.work(to.backend.context)
        self._key.reserve(request, work, self._model)
        began = self._clock()
        async with (
            self._delivery,
            to.backend.admission.admit(work, self._key.party),
            to.backend.lease(to.model) as engine,
        ):
            self._place_s = self._clock() - began
            try:
                await self._forward(engine, request)
            except EngineUnreachableError as error:
                await self._forward_to_another(to, engine, request, error)

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
        self._served = engine.served
        self._scope["state"]["version"] = engine.served.version
        payload = request.payload(engine.engine_model)
        self._asked = self._clock()
        trace = self._trace.header_lines if self._trace else ""
        async with EngineCall(engine.http, self._route.value, payload, self._request_id, trace) as answer:
            if answer.is_event_stream:
                await _Stream(self, engine.served, wants_usage=request.wants_usage).forward(answer)
            else:
                await self._take_whole(engine.served, answer)

    async def _take_whole(self, served: Target, answer: EngineAnswer) -> None:
        parts: list[bytes] = []
        while part := await answer.read_some():
            self._delivery.reserve(len(part))
            parts.append(part)
        self.heard()
        body = b"".join(parts)
        self.keep(body)
        if reason := self.format.finish_reason(body):
            self.finished(reason)
        if usage := self.format.usage(body):
            self.used(served, usage)
        self.complete = True
        self.start("application/json", len(body))
        self._delivery.put(body)

    async def _fail(self, error: ApiError, receive: Receive) -> None:
        """Answers with an error; within a stream with an event, and without the one that ends a good answer."""
        self._failed(error.code)
        if not self.begun:
            self._status = error.status
            timeout_s = self._gateway.settings.body_timeout_s
            await answer_error(error, self._scope, receive, self._asgi_send, body_timeout_s=timeout_s)
            return
        try:
            await self._delivery.send_last(self.format.error_event(error.body(self._route)))
        except ClientSlowError:
            await cut_off(self._scope, receive)

    def _failed(self, code: ErrorCode) -> None:
        self._reason = code
        self._gateway.metrics.request_failed(self._served, code, self._model)

    @property
    def _delivered(self) -> bool:
        """All of the answer was handed over: OpenAI's client closes the connection once it reads the last event."""
        return self.complete and not self._delivery.pending

    @property
    def _request_id(self) -> str:
        request_id: str = self._scope["state"]["request_id"]
        return request_id

    @property
    def metrics(self) -> GatewayMetrics:
        """Where the exchange is counted."""
        return self._gateway.metrics

    def keep(self, part: bytes) -> None:
        """Takes a part of the answer, a body or an event, where its content is to be kept."""
        if self._content:
            self._content.add(part)

    def finished(self, reason: str) -> None:
        """Takes why the answer ended: the first that is said."""
        self._finish_reason = self._finish_reason or reason

    def used(self, served: Target, usage: Usage) -> None:
        """Counts the tokens of the answer."""
        self._usage = usage
        self.metrics.tokens(served, usage)

    def token_passed(self) -> None:
        """Counts an event with tokens, for an answer whose tokens the engine will not tell."""
        self._key.token_events += 1

    def first_token(self, served: Target, seconds: float) -> None:
        """Times the first token of the answer."""
        self._first_token_s = seconds
        self.metrics.first_token(served, seconds, self._request_id)

    @property
    def begun(self) -> bool:
        """The head of the answer was given to the delivery, or sent."""
        return self._status is not None

    def elapsed(self) -> float:
        """Seconds since the request was read."""
        return self._clock() - self._started

    def heard(self) -> None:
        """The engine has said something; what it said last before the answer begins counts."""
        self._engine_s = self._clock() - self._asked

    def start(self, content_type: str, length: int | None = None) -> None:
        """Begins a good answer."""
        self._own_s = self.elapsed() - self._place_s - self._engine_s
        headers = [
            (b"content-type", content_type.encode("latin-1")),
            (b"x-svc-overhead-ms", b"%.2f" % (self._own_s * 1000)),
        ]
        if length is None:
            headers.append((b"cache-control", b"no-cache"))
        else:
            headers.append((b"content-length", b"%d" % length))
        self._status = 200
        self._delivery.start({"type": "http.response.start", "status": 200, "headers": headers})

    def send_at_once(self, data: bytes) -> bool:
        """Hands events of a stream to a client that takes them without a wait; whether it did."""
        return self._delivery.put_at_once(data)

    async def send_event(self, data: bytes) -> None:
        """Hands events of a stream to the delivery, which keeps them for the client."""
        await self._delivery.put_event(data)


class _Stream:
    """Passes the events of one answer on, and times and counts its tokens."""

    def __init__(self, exchange: Exchange, served: Target, *, wants_usage: bool) -> None:
        self._exchange = exchange
        self._format = exchange.format
        self._served = served
        self._wants_usage = wants_usage
        self._between_tokens = exchange.metrics.between_tokens(served)
        self._splitter = EventSplitter()
        self._last_token: float | None = None
        self._content_type = ""
        self._left = b""  # what the client did not take at once
        self._error: EngineError | None = None

    async def forward(self, answer: EngineAnswer) -> None:
        """Until the end of the answer.

        Raises:
            EngineError: an error of the engine within the stream, or an end before the last event.
        """
        self._content_type = answer.content_type
        while not await answer.pass_to(self._take):
            await self._exchange.send_event(self._left)
            if self._error is not None:
                raise self._error
        if not self._exchange.complete:
            raise EngineDiedError("the engine went away; it is being restarted")

    def _take(self, chunk: bytes) -> bool:
        """Passes on what has come; whether the client took it at once.

        Raises:
            EngineError: one within the stream.
        """
        if not self._exchange.begun:
            self._exchange.heard()
        passed: list[bytes] = []
        try:
            for event in self._splitter.feed(chunk):
                if self._passes(event):
                    passed.append(event)
        except EngineError as error:
            self._error = error  # after what came together with it, and before it
        if passed:
            if not self._exchange.begun:
                self._exchange.start(self._content_type)
            data = passed[0] if len(passed) == 1 else b"".join(passed)
            if not self._exchange.send_at_once(data):
                self._left = data
                return False
        if self._error is not None:
            raise self._error
        return True

    def _passes(self, event: bytes) -> bool:
        """Looks at an event; whether the client gets it."""
        seen = self._format.classify(event)
        if seen.error is not None:
            code = seen.error.get("code") if isinstance(seen.error, dict) else None
            raise refusal(code if isinstance(code, int) else 500, seen.error)
        self._exchange.keep(event)
        if seen is TOKEN:
            self._time_token()
            return True
        if seen.finish_reason:
            self._exchange.finished(seen.finish_reason)
        if seen.usage:
            self._exchange.used(self._served, seen.usage)
        if seen.end:
            self._exchange.complete = True
        if seen.token:
            self._time_token()
        return self._wants_usage or not seen.usage

    def _time_token(self) -> None:
        self._exchange.token_passed()
        now = self._exchange.elapsed()
        if self._last_token is None:
            self._exchange.first_token(self._served, now)
        else:
            self._between_tokens(now - self._last_token)
        self._last_token = now
