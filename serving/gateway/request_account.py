"""The record of a request, from which its metrics and its database row are created.

It contains the request's key, the version that answered, times, tokens and outcome. It is filled in by
serving.gateway.inference and, for streamed answers, by serving.gateway.event_stream. This module knows nothing about
the connections to the client and the engine.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from serving.engines.token_pace import TokenPace
from serving.gateway.key_account import KeyAccount
from serving.http.request_state import RequestState
from serving.protocols.error_code import ErrorCode, outcome_of
from serving.protocols.request import CompletionRequest
from serving.protocols.route import Route
from serving.protocols.wire_formats import Usage
from serving.rollout.split import Assignment
from serving.telemetry.content import Content
from serving.telemetry.metrics import CLIENT_GONE_STATUS, UNKNOWN_MODEL, GatewayMetrics
from serving.telemetry.request_log import RequestLog
from serving.telemetry.traces.request_trace import RequestTrace
from svc.store.requests import RequestRecord, hash_user
from svc.version import Target


@dataclass(eq=False)
class RequestAccount:
    """Record of a single request, filled in from the request's arrival until its end.

    Attributes:
        state: the request's state, which contains its id. This class sets the state's `version`.
        metrics: metrics in which the request is counted.
        request_log: log that stores the request's row.
        key: object that counts the request against its key's limits, and records its usage at the end.
        trace: the request's span, which is completed at the end. None if tracing is off.
        clock: function that returns monotonic time, in seconds.
        model: the requested model, from a bounded set of names.
        work: maximum number of tokens in the request's answers.
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
    key: KeyAccount
    trace: RequestTrace | None
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self._arrived = datetime.now(UTC)
        self._started = self.clock()
        self._asked = 0.0  # when the request was sent to the engine
        self._place_s = self._engine_s = 0.0  # waited for a slot, and for the beginning of the engine's answer
        self._own_s: float | None = None  # the gateway's time before the answer began
        self._first_token_s: float | None = None
        self._request: CompletionRequest | None = None
        self._content: Content | None = None  # only if content or features are stored, or a rollout needs the answer
        self._assignment: Assignment | None = None
        self._served: Target | None = None
        self._reason: ErrorCode | None = None
        self._finish_reason: str | None = None
        self._usage: Usage | None = None
        self._pace: TokenPace | None = None
        self.model = UNKNOWN_MODEL
        self.work = 0
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
        self.key.body_bytes = size

    def parsed(self, request: CompletionRequest) -> None:
        self._request = request
        if self.request_log.wants_content():
            self._content = Content(self.route, request.members)

    def assigned(self, assignment: Assignment) -> None:
        """Record a rollout's assignment of the request to a version, and keep the answer if the rollout needs it."""
        self._assignment = assignment
        if (assignment.expects_json or assignment.mirror) and self._content is None and self._request:
            self._content = Content(self.route, self._request.members, stored=False)
        if self._content:
            self._content.expects_json = assignment.expects_json

    def admitted(self, waited_s: float) -> None:
        """Record how long the request waited for admission. For a batch request, restart the timing instead."""
        if self.state.in_batch:
            self._started = self.clock()
        else:
            self._place_s = waited_s

    def served_by(self, target: Target, pace: TokenPace) -> None:
        """Record the version to which the request is being sent, and the generation speed of the model's engines."""
        if self._request and target != self._served:
            self._gather_features(self._request, target)
        self._served, self._pace = target, pace
        self.state.version = target.version
        self._asked = self.clock()

    def _gather_features(self, request: CompletionRequest, target: Target) -> None:
        """Decide whether to store the request's features for this version."""
        wanted = self.request_log.wants_features(target)
        if wanted and self._content is None:
            self._content = Content(self.route, request.members, stored=False)
        if self._content:
            self._content.features = wanted

    def heard(self) -> None:
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
        return self._request.answers if self._request else 1

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
            self.key.settle(None, self._reason, None)
            return
        status = CLIENT_GONE_STATUS if self.status is None else self.status
        seconds, served, usage, request = self.elapsed(), self._served, self._usage, self._request
        self.metrics.request_ended(
            served,
            self.route,
            status,
            None if self.state.in_batch else seconds,
            self.state.request_id,
            reason=self._reason,
            model=self.model,
        )
        self.key.settle(served, self._reason, usage, computed=self._computed)
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
            key_id=self.key.key_id,
            finish_reason=self._finish_reason,
            first_token_seconds=self._first_token_s,
            tokens_in=usage.prompt if usage else None,
            tokens_out=usage.completion if usage else None,
            temperature=request.temperature if request else None,
            max_tokens=request.max_tokens if request else None,
            user_hash=hash_user(request.user) if request and request.user else None,
            unit=self._assignment.unit if self._assignment else None,
        )
        self._offer_to_mirror(record)
        if trace := self.trace:
            # A model name that is not served is text from the client.
            model = request.model if request and served else self.model
            trace.end(
                model=model,
                stream=request.stream if request else None,
                queue_s=self._place_s,
                overhead_s=self._own_s,
            )
        traced = trace if trace and trace.sampled else None
        self.request_log.add(record, self._content if served else None, traced)

    def _offer_to_mirror(self, record: RequestRecord) -> None:
        """Pass a finished request to the rollout's shadow step, unless its answer was too long to keep."""
        mirror, content = self._assignment.mirror if self._assignment else None, self._content
        if mirror and content and not content.too_long:
            mirror.offer(self.route, content.payload, content.answer, record)
