"""One inference request, from its arrival until its metrics, its usage and its database row are recorded.

The record grows in the order in which serving.gateway.inference handles the request: read, counted for its key, parsed,
routed, reserved, admitted, sent, answered, ended. For streamed answers, serving.gateway.event_stream fills in the
answer. This module knows nothing about the connections to the client and the engine.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from serving.access.usage_meter import UsageMeter
from serving.admission.errors import RateLimitedError
from serving.admission.rate_limiter import Demand, Limit, RateLimiter, Reservation, estimated_tokens
from serving.admission.tenant import Tenant, tenant_of
from serving.engines.token_pace import TokenPace
from serving.http.request_state import RequestState
from serving.protocols.error_code import CLIENT_FAULTS, ErrorCode, outcome_of
from serving.protocols.request import CompletionRequest
from serving.protocols.route import Route
from serving.protocols.wire_formats import Usage
from serving.rollout.split import Assignment
from serving.telemetry.content import Content
from serving.telemetry.metrics import CLIENT_GONE_STATUS, UNKNOWN_MODEL, GatewayMetrics
from serving.telemetry.request_log import RequestLog
from serving.telemetry.traces.request_trace import RequestTrace
from svc.store.requests import RequestOutcome, RequestRecord, hash_user
from svc.version import Target

_BATCH_RETRY_S = 2
_CLIENT_LEFT = (RequestOutcome.CLIENT_GONE, RequestOutcome.CLIENT_SLOW)


@dataclass(eq=False)
class Request:
    """A single inference request.

    Attributes:
        state: what all layers know about the request: its id, key and reservation. This class sets its `version` and
            `reservation`.
        metrics: metrics in which the request is counted.
        request_log: log that stores the request's row.
        limiter: enforces the limits of the request's key. A request without a key has no limits, only usage.
        usage_meter: counts the usage of the request's key.
        trace: the request's span, which is completed at the end. None if tracing is off.
        clock: function that returns monotonic time, in seconds.
        model: the requested model, from a bounded set of names.
        work: maximum number of tokens in the request's answers.
        token_events: number of forwarded events that contain tokens. Used if the engine sends no token counts.
        status: HTTP status of the response, or None until the response begins.
        begun: whether the response headers were sent, or passed to `Delivery` for sending.
        complete: whether the engine has sent the complete answer.
        withdrawn: whether this is a request in a batch that will be retried later. It is then neither counted nor
            stored.
    """

    route: Route
    state: RequestState
    metrics: GatewayMetrics
    request_log: RequestLog
    limiter: RateLimiter
    usage_meter: UsageMeter
    trace: RequestTrace | None
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.principal = self.state.principal
        self._arrived = datetime.now(UTC)
        self._started = self.clock()
        self._body_bytes = 0
        self._reservation: Reservation | None = None
        self._asked = 0.0  # when the request was sent to the engine
        self._place_s = self._engine_s = 0.0  # waited for a slot, and for the beginning of the engine's answer
        self._own_s: float | None = None  # the gateway's time before the answer began
        self._first_token_s: float | None = None
        self._completion: CompletionRequest | None = None
        self._content: Content | None = None  # only if content or features are stored, or a rollout needs the answer
        self._assignment: Assignment | None = None
        self._served: Target | None = None
        self._reason: ErrorCode | None = None
        self._finish_reason: str | None = None
        self._usage: Usage | None = None
        self._pace: TokenPace | None = None
        self.model = UNKNOWN_MODEL
        self.work = self.token_events = 0
        self.status: int | None = None
        self.begun = False
        self.complete = False
        self.withdrawn = False

    def elapsed(self) -> float:
        """Return the number of seconds since the request was read."""
        return self.clock() - self._started

    def body_read(self, size: int) -> None:
        """Start timing the request, now that its body is complete, and record the body's size."""
        self._started = self.clock()
        self._body_bytes = size

    @property
    def tenant(self) -> Tenant:
        """The tenant that the request belongs to when several tenants share the model."""
        return tenant_of(self.principal, self.state.interruption)

    def count(self) -> None:
        """Count the request against its key's limit on requests per minute.

        Raises:
            RateLimitedError: the key has no requests left in this minute.
        """
        if self.principal is None:
            return
        try:
            self._reservation = self.limiter.reserve_request(self.principal)
        except RateLimitedError as error:
            self.metrics.key_refused(self.principal.key_id, UNKNOWN_MODEL, error.limit)
            raise

    def parsed(self, completion: CompletionRequest) -> None:
        self._completion = completion
        if self.request_log.wants_content():
            self._content = Content(self.route, completion.members)

    def assigned(self, assignment: Assignment) -> None:
        """Record a rollout's assignment of the request to a version, and keep the answer if the rollout needs it."""
        self._assignment = assignment
        if (assignment.expects_json or assignment.mirror) and self._content is None and self._completion:
            self._content = Content(self.route, self._completion.members, stored=False)
        if self._content:
            self._content.expects_json = assignment.expects_json

    def reserve(self) -> None:
        """For each limit of the request's key except requests per minute, reserve the maximum that the request may use.
        Without a key, do nothing.

        Raises:
            RateLimitedError: not enough of a limit is left.
        """
        if self.principal is None or self._reservation is None:
            return
        bounded = self._completion is not None and self._completion.max_tokens is not None
        demand = Demand(estimated_tokens(self._body_bytes), self.work, bounded=bounded)
        try:
            self._reservation = self.limiter.reserve(self.principal, demand, self._reservation)
        except RateLimitedError as error:
            self.metrics.key_refused(self.principal.key_id, self.model, error.limit)
            raise
        if not self.state.in_batch:
            self.state.reservation = self._reservation

    def reserve_in_batch(self) -> None:
        """Reserve the maximum amount that a batch request may use, provided that half of each limit stays free for the
        key's other requests.

        The daily limit is exempt: batch requests may use all of it.

        Raises:
            RateLimitedError: not enough of a limit is left.
        """
        if self.principal is None:
            return
        for limit, allowance in self.limiter.allowances(self.principal).items():
            if limit is not Limit.TOKENS_PER_DAY and 2 * allowance.remaining < allowance.limit:
                raise RateLimitedError(
                    f"half of this key's {limit} limit is reserved for requests outside batches",
                    limit=limit.value,
                    retry_after_s=_BATCH_RETRY_S,
                )
        self.count()
        self.reserve()

    def admitted(self, waited_s: float) -> None:
        """Record how long the request waited for admission. For a batch request, restart the timing instead."""
        if self.state.in_batch:
            self._started = self.clock()
        else:
            self._place_s = waited_s

    def served_by(self, target: Target, pace: TokenPace) -> None:
        """Record the version to which the request is being sent, and the generation speed of the model's engines."""
        if self._completion and target != self._served:
            self._gather_features(self._completion, target)
        self._served, self._pace = target, pace
        self.state.version = target.version
        self._asked = self.clock()

    def _gather_features(self, completion: CompletionRequest, target: Target) -> None:
        """Decide whether to store the request's features for this version."""
        wanted = self.request_log.wants_features(target)
        if wanted and self._content is None:
            self._content = Content(self.route, completion.members, stored=False)
        if self._content:
            self._content.features = wanted

    def answer_arrived(self) -> None:
        """Record the time since the request was sent to the engine. `begin` excludes it from the gateway's own time."""
        self._engine_s = self.clock() - self._asked

    def begin(self) -> float:
        """Mark the response as successfully begun, and return the gateway's own processing time so far, in seconds."""
        self.status, self.begun = 200, True
        self._own_s = self.elapsed() - self._place_s - self._engine_s
        return self._own_s

    def keep(self, part: bytes) -> None:
        """Store a piece of the answer (a body or an event) if content or features are stored, or a rollout needs it."""
        if self._content:
            self._content.add(part)

    def first_token(self, seconds: float) -> None:
        """Record the time to the first token of a streamed answer."""
        self._first_token_s = seconds
        self.metrics.first_token(self._answering, seconds, self.state.request_id)

    def finished(self, reason: str) -> None:
        """Record an answer's finish reason. If a request has several answers, only the first reason is kept."""
        self._finish_reason = self._finish_reason or reason

    def used(self, usage: Usage) -> None:
        """Record the number of tokens used by the answer."""
        self._usage = usage
        self.metrics.tokens(self._answering, usage)

    def completed(self) -> None:
        """Mark the answer as complete. Call this after `used`."""
        self.complete = True
        if self._usage and self._pace:
            self._pace.observe(self._usage.completion / self._answers, self.clock() - self._asked)

    def failed(self, code: ErrorCode) -> None:
        """Mark the request as failed, even if part of the answer has been sent."""
        self._reason = code
        self.metrics.request_failed(self._served, code, self.model)

    @property
    def _answers(self) -> int:
        """Number of answers that the engine generates concurrently for the request."""
        return self._completion.answers if self._completion else 1

    @property
    def _computed(self) -> int:
        """Estimated number of tokens generated so far for an incomplete answer, or 0 if the answer is complete."""
        if self.complete or self._pace is None:
            return 0
        return min(self.work, math.ceil(self._answers * self._pace.tokens_in(self.clock() - self._asked)))

    @property
    def _answering(self) -> Target:
        """The version that is answering the request.

        Raises:
            RuntimeError: `served_by` has not been called yet.
        """
        if self._served is None:
            raise RuntimeError("the request has not been sent to a version yet")
        return self._served

    def end(self) -> None:
        """Count the request, charge it to its key's limits and store its row. Call this once the outcome is known."""
        if self.withdrawn:
            self._settle(None)
            return
        status = CLIENT_GONE_STATUS if self.status is None else self.status
        seconds, served, usage, completion = self.elapsed(), self._served, self._usage, self._completion
        self.metrics.request_ended(
            served,
            self.route,
            status,
            None if self.state.in_batch else seconds,
            self.state.request_id,
            reason=self._reason,
            model=self.model,
        )
        self._settle(served)
        record = RequestRecord(
            request_id=self.state.request_id,
            client_request_id=self.state.client_request_id,
            started_at=self._arrived,
            model=served.version.name if served else self.model,
            version=served.version if served else None,
            format=served.format if served else None,
            route=self.route.value,
            status=status,
            seconds=seconds,
            reason=self._reason.value if self._reason else None,
            outcome=outcome_of(self._reason),
            key_id=self.principal.key_id if self.principal else None,
            finish_reason=self._finish_reason,
            first_token_seconds=self._first_token_s,
            tokens_in=usage.prompt if usage else None,
            tokens_out=usage.completion if usage else None,
            temperature=completion.temperature if completion else None,
            max_tokens=completion.max_tokens if completion else None,
            user_hash=hash_user(completion.user) if completion and completion.user else None,
            unit=self._assignment.unit if self._assignment else None,
        )
        self._offer_to_mirror(record)
        if trace := self.trace:
            # A model name that is not served is text from the client.
            model = completion.model if completion and served else self.model
            trace.end(
                model=model,
                stream=completion.stream if completion else None,
                queue_s=self._place_s,
                overhead_s=self._own_s,
            )
        traced = trace if trace and trace.sampled else None
        self.request_log.add(record, self._content if served else None, traced)

    def _settle(self, served: Target | None) -> None:
        """Record the usage of the request's key, and replace or release its reservation.

        Args:
            served: the version that answered, or None if no version did.
        """
        spent = self._spent() if served else None
        if self._reservation:
            if spent:
                self._reservation.settle(spent.prompt, spent.completion)
            elif self._reason in CLIENT_FAULTS:
                self._reservation.settle(0, 0)
            else:
                self._reservation.release()
        if spent and served:
            key_id, model = self.principal.key_id if self.principal else None, served.version.name
            self.metrics.key_used(key_id or "", model, spent)
            self.usage_meter.add(key_id, model, tokens_in=spent.prompt, tokens_out=spent.completion)

    def _spent(self) -> Usage | None:
        """Return the request's usage, or None if it was rejected or failed before its first token.

        If the client disconnected, the tokens of the prompt and the answer are estimated, so that disconnecting
        early saves nothing. An event may contain several tokens, so the number of events is a lower bound.
        """
        client_left = outcome_of(self._reason) in _CLIENT_LEFT
        if self._reason and not self.token_events and not client_left:
            return None
        tokens = max(self.token_events, self._computed) if client_left else self.token_events
        return self._usage or Usage(estimated_tokens(self._body_bytes), tokens)

    def _offer_to_mirror(self, record: RequestRecord) -> None:
        """Pass a finished request to the rollout's shadow step, unless its answer was too long to keep."""
        mirror, content = self._assignment.mirror if self._assignment else None, self._content
        if mirror and content and not content.too_long:
            mirror.offer(self.route, content.payload, content.answer, record)
