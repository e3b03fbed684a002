"""The gateway's own Prometheus instruments, created in a given registry.

Clients cannot create new series: models that are not served are counted as `unknown`, routes and reasons
are enums, and only statuses that the gateway sends are counted. Since the number of versions grows,
versions without requests for a day are removed (see `remove_idle`). The number of key ids grows too, but
only the operator can create keys. The metrics that vLLM itself exposes and the metrics of engines and rollouts are not
defined here (see `engine_metrics` and `deployment_metrics`).
"""

import time
from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram

from serving.access.authenticator import KeyFault
from serving.protocols.error_code import ErrorCode, outcome_of
from serving.protocols.route import Route
from serving.protocols.wire_formats import Usage
from serving.telemetry.loop_instruments import LoopCounter, LoopHistogram
from serving.telemetry.quantiles import VersionQuantiles
from serving.telemetry.traces.request_trace import SpanDropped
from svc.store.feedback import Rating
from svc.store.requests import Dropped
from svc.store.webhooks import WebhookOutcome
from svc.version import Target, VersionId

CLIENT_GONE_STATUS = 499
"""Status that nginx uses for a client that disconnected before the response began. It is counted, but never
sent."""
UNKNOWN_MODEL = "unknown"
IDLE_VERSION_TIMEOUT_S = 24 * 3600.0
"""Seconds without requests after which an unserved version's metrics are removed. Without this limit, the metrics page
grew to 2 MB with 300 versions."""
_NOT_COMPLETIONS = {
    ErrorCode.PERMISSION_DENIED,
    ErrorCode.TOO_MANY_WRONG_KEYS,
    ErrorCode.KEYS_UNAVAILABLE,
    ErrorCode.HOST_NOT_ALLOWED,
    ErrorCode.NOT_FOUND,
    ErrorCode.METHOD_NOT_ALLOWED,
    ErrorCode.CHANGE_CONFLICT,
    ErrorCode.CHANGE_REFUSED,
    ErrorCode.GATE_FAILED,
    ErrorCode.MODEL_NOT_DELETABLE,
    ErrorCode.FINE_TUNING_DISABLED,
    ErrorCode.JOB_ENDED,
    ErrorCode.BATCH_ENDED,
    ErrorCode.FILE_TOO_LARGE,
    ErrorCode.STORAGE_LIMIT,
    ErrorCode.DISK_FULL,
    ErrorCode.FILE_IN_USE,
    ErrorCode.UPLOAD_ENDED,
    ErrorCode.FILE_CONTENT_MISSING,
    ErrorCode.REQUEST_NOT_FOUND,
    ErrorCode.REQUEST_LOG_BUSY,
    ErrorCode.STORE_UNAVAILABLE,
}

# An answer takes from 50 ms (a few tokens on a GPU) to minutes (2,000 tokens on a CPU): each bucket is at most 2.5
# times the previous one. The last is the default limit on the engine's silence.
_DURATION_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)
# The first token waits for the prompt: 10 ms for a short one on a GPU, many seconds for a long one on a CPU or in a
# queue. Finer below 1 s, where people begin to notice.
_FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 2, 4, 8, 15, 30, 60)
# 5 ms is typical of a small model on a GPU, and 250 ms is as slow as people read. More is a stall, for example because
# of another request's long prompt or a preemption.
_BETWEEN_TOKENS_BUCKETS_S = (0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
# 1 ms is the clock's resolution, 20 ms is the longest that a callback may compute, and from 100 ms on, people notice.
_LAG_BUCKETS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2, 5)


class GatewayMetrics:
    """Counts the gateway's requests and measures their durations.

    Args:
        registry: registry for the instruments. Each registry may have only one GatewayMetrics.
        clock: function that returns monotonic time in seconds, used for the quantiles' time window and to
            detect idle versions.

    Attributes:
        rows_stored: function that counts rows written to the store.
        spans_sent: function that counts spans accepted by the receiver.
        loop_lagged: function that records how late the event loop woke up a task, in seconds.
    """

    def __init__(self, registry: CollectorRegistry, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = registry
        self._clock = clock
        self._used: set[tuple[str, str]] = set()  # versions, since the last `remove_idle`
        self._last_used: dict[tuple[str, str], float] = {}
        counter, loop_counter = partial(Counter, registry=registry), partial(LoopCounter, registry=registry)
        version, key = ("model", "version"), ("model", "key_id")
        self._requests = loop_counter(
            "svc_requests_total",
            "Finished requests, by route, status and outcome",
            (*version, "route", "status", "outcome"),
        )
        self._errors = loop_counter("svc_request_errors_total", "Failed requests, by reason", (*version, "reason"))
        self._tokens = loop_counter(
            "svc_tokens_total", "Prompt and answer tokens, by direction", (*version, "direction")
        )
        self._key_requests = loop_counter("svc_key_requests_total", "Requests accepted by an engine, by key", key)
        self._key_tokens = loop_counter(
            "svc_key_tokens_total", "Prompt and answer tokens, by key and direction", (*key, "direction")
        )
        self._key_refused = counter(
            "svc_key_refused_total", "Requests refused because their key reached a limit", (*key, "limit")
        )
        self._wrong_keys = counter(
            "svc_authentication_failures_total", "Requests rejected for lack of a valid API key, by fault", ("fault",)
        )
        self._feedback = loop_counter("svc_feedback_total", "Rated answers, by rating", (*version, "rating"))
        self.rows_stored = counter("svc_request_log_rows_total", "Rows stored in the request log, one per request").inc
        self._rows_dropped = counter(
            "svc_request_log_dropped_total",
            "Rows of the request log that were stored without content or not at all, by reason",
            ("reason",),
        )
        self.spans_sent = counter("svc_spans_total", "Spans accepted by the trace receiver").inc
        self._spans_dropped = counter(
            "svc_spans_dropped_total", "Spans that were sent without content or not at all, by reason", ("reason",)
        )
        self._webhooks = counter(
            "svc_webhook_deliveries_total", "Attempts to deliver a webhook message, by outcome", ("outcome",)
        )
        self._add_times(clock)
        self.show_errors(None)
        for outcome in WebhookOutcome:
            self._webhooks.labels(outcome.value)
        for fault in KeyFault:
            self._wrong_keys.labels(fault.value)
        for row in Dropped:
            self._rows_dropped.labels(row.value)
        for span in SpanDropped:
            self._spans_dropped.labels(span.value)

    def _add_times(self, clock: Callable[[], float]) -> None:
        histogram = partial(LoopHistogram, registry=self.registry)
        quantiles = partial(VersionQuantiles, clock=clock, registry=self.registry)
        version = ("model", "version")
        self._duration = histogram(
            "svc_request_duration_seconds",
            "Time in seconds from the request's last byte to the answer's last byte, for complete answers",
            (*version, "route"),
            _DURATION_BUCKETS_S,
        )
        self._duration_quantiles = quantiles(
            "svc_request_duration_quantile_seconds",
            "Duration in seconds of requests with complete answers, over the last 5 minutes",
        )
        self._first_token = histogram(
            "svc_time_to_first_token_seconds",
            "Time in seconds from the request's last byte to the first token, for streamed answers",
            version,
            _FIRST_TOKEN_BUCKETS_S,
        )
        self._first_token_quantiles = quantiles(
            "svc_time_to_first_token_quantile_seconds",
            "Time in seconds to the first streamed token, over the last 5 minutes",
        )
        self._between_tokens = histogram(
            "svc_time_between_tokens_seconds",
            "Time in seconds between two consecutive tokens of a streamed answer",
            version,
            _BETWEEN_TOKENS_BUCKETS_S,
        )
        self.loop_lagged = Histogram(
            "svc_event_loop_lag_seconds",
            "Event-loop lag in seconds: how late a task is woken up, measured ten times per second",
            buckets=_LAG_BUCKETS_S,
            registry=self.registry,
        ).observe

    def show_errors(self, served: Target | None, model: str = UNKNOWN_MODEL) -> None:
        """Create a version's error series, initially 0, so that PromQL's `increase` counts the first error.

        Args:
            served: the version, or None for requests that no version answers.
            model: the requested model, used if no version answers.
        """
        for code in set(ErrorCode) - _NOT_COMPLETIONS:
            self._errors.counts[*self._labels(served, model), code.value] += 0

    def remove_idle(self, served: Iterable[VersionId]) -> None:
        """Remove all series of unserved versions that have had no requests for `IDLE_VERSION_TIMEOUT_S`.

        This runs in the event loop, before each metrics page is written. A call to `between_tokens` or to any counting
        method counts as a request, so a running request's series stay on the page.

        Args:
            served: the versions that are currently served, whose series stay.
        """
        now = self._clock()
        self._used.update((version.name, str(version.number)) for version in served)
        self._last_used |= dict.fromkeys(self._used, now)
        self._used.clear()
        idle = {version for version, used in self._last_used.items() if now - used >= IDLE_VERSION_TIMEOUT_S}
        if not idle:
            return
        for instrument in (
            self._requests,
            self._errors,
            self._tokens,
            self._feedback,
            self._duration,
            self._first_token,
            self._between_tokens,
        ):
            instrument.remove(idle)
        for version in idle:
            del self._last_used[version]

    def key_used(self, key_id: str, model: str, usage: Usage) -> None:
        """Count the usage of one request.

        Args:
            key_id: id of the key, or an empty string if there is none.
            model: name of the model, from a bounded set.
        """
        self._key_requests.counts[model, key_id] += 1
        self._key_tokens.counts[model, key_id, "in"] += usage.prompt
        self._key_tokens.counts[model, key_id, "out"] += usage.completion

    def key_refused(self, key_id: str, model: str, limit: str) -> None:
        """Count a request that exceeded one of its key's limits."""
        self._key_refused.labels(model, key_id, limit).inc()

    def request_ended(
        self,
        served: Target | None,
        route: Route,
        status: int,
        seconds: float | None,
        request_id: str = "",
        *,
        reason: ErrorCode | None = None,
        model: str = UNKNOWN_MODEL,
    ) -> None:
        """Count a response, and record its duration if it is complete.

        Args:
            served: the version that answered, or None if no version did.
            status: the HTTP status that was sent, or `CLIENT_GONE_STATUS`.
            seconds: time from the last byte of the request to the last byte of the response; None for a batch
                request, because no client waits for it.
            request_id: request id shown in the exemplar.
            reason: why the request failed, possibly within a stream, or None if it succeeded.
            model: the requested model, from a bounded set. Used if no version answered.
        """
        model, version = labels = self._version_labels(served.version) if served else (model, "")
        self._requests.counts[model, version, route, str(status), outcome_of(reason)] += 1
        if served and reason is None and seconds is not None:
            self._duration.series(model, version, route).observe(seconds, {"request_id": request_id})
            self._duration_quantiles.observe(labels, seconds)

    def first_token(self, served: Target, seconds: float, request_id: str = "") -> None:
        version = self._version_labels(served.version)
        self._first_token.series(*version).observe(seconds, {"request_id": request_id})
        self._first_token_quantiles.observe(version, seconds)

    def between_tokens(self, served: Target) -> Callable[[float], None]:
        """Return a function that records the time between two tokens, in seconds.

        Call this once per answer, to avoid a lookup for each token.
        """
        return self._between_tokens.series(*self._version_labels(served.version)).observe

    def tokens(self, served: Target, usage: Usage) -> None:
        model, version = self._version_labels(served.version)
        self._tokens.counts[model, version, "in"] += usage.prompt
        self._tokens.counts[model, version, "out"] += usage.completion

    def request_failed(self, served: Target | None, code: ErrorCode, model: str = UNKNOWN_MODEL) -> None:
        """Count a failed request under its reason for failing. Failures within a stream with status 200 are included.

        Args:
            served, model: see `request_ended`.
        """
        self._errors.counts[*self._labels(served, model), code.value] += 1

    def rows_dropped(self, reason: Dropped, count: int) -> None:
        """Count request log rows that were not stored, or were stored without their content."""
        self._rows_dropped.labels(reason.value).inc(count)

    def spans_dropped(self, reason: SpanDropped, count: int) -> None:
        """Count trace spans that were not sent, or were sent without their content."""
        self._spans_dropped.labels(reason.value).inc(count)

    def webhooks_ended(self, outcome: WebhookOutcome, count: int = 1) -> None:
        """Count webhook delivery attempts and dropped webhook messages, by outcome."""
        self._webhooks.labels(outcome.value).inc(count)

    def feedback_given(self, version: VersionId | None, rating: Rating) -> None:
        labels = self._version_labels(version) if version else (UNKNOWN_MODEL, "")
        self._feedback.counts[*labels, rating.value] += 1

    def authentication_failed(self, fault: KeyFault) -> None:
        """Count a request that was rejected for lack of a valid key."""
        self._wrong_keys.labels(fault.value).inc()

    def _labels(self, served: Target | None, model: str = UNKNOWN_MODEL) -> tuple[str, str]:
        return self._version_labels(served.version) if served else (model, "")

    def _version_labels(self, version: VersionId) -> tuple[str, str]:
        """Return the values of the `model` and `version` labels, and record that the version is in use."""
        labels = version.name, str(version.number)
        self._used.add(labels)
        return labels
