"""Traces requests: begins a span for each request, and sends it to the receiver when the request has finished.

No request waits for the receiver. If spans are created faster than the receiver accepts them, excess spans are dropped
and counted, as is content beyond the queue's limit. OpenTelemetry's own code handles malformed Trace Context headers.
"""

import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, TraceState, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AnyValue

from serving.telemetry.traces.request_trace import RequestTrace, SpanDropped
from serving.telemetry.traces.span import CONTENT, span_attributes, span_name, span_status
from svc.identity.key_secret import hide_secrets
from svc.store.requests import RequestRecord

log = logging.getLogger(__name__)

MAX_QUEUED = 4096
MAX_QUEUED_CONTENT = 64 * 2**20
"""Maximum total number of characters in queued prompts and answers."""
_BATCH = 64
"""Maximum number of spans sent to the receiver in one request. Serializing this many spans takes 5 ms, which is
Python's switch interval. With more spans, the event loop would have to wait for several intervals."""
_EVERY_MS = 2000
_CLOSE_S = 5.0
_PARENT, _STATE = b"traceparent", b"tracestate"


class Tracer:
    """Begins a span for each request, either as a child of the client's span or as the start of a new trace.

    Args:
        sample_share: fraction of new traces that are sampled. If the client started the trace, the client's sampling
            decision applies.
    """

    def __init__(self, sample_share: float) -> None:
        self._ids = RandomIdGenerator()
        self._sample_share = sample_share
        self._propagator = TraceContextTextMapPropagator()
        # Disabled because its warnings quote clients' headers, each time that one is sent.
        logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)

    def begin(self, headers: Sequence[tuple[bytes, bytes]]) -> RequestTrace:
        """Begin a span for a request, in the client's trace if the request names one, otherwise in a new trace."""
        parent = self._parent(headers)
        span_id = self._ids.generate_span_id()
        if parent is not None:
            state = parent.trace_state.to_header()
            if hide_secrets(state) != state:
                state = ""
            return RequestTrace(parent.trace_id, span_id, parent.span_id, state, parent.trace_flags.sampled)
        sampled = random.random() < self._sample_share  # noqa: S311 - a sample, no secret
        return RequestTrace(self._ids.generate_trace_id(), span_id, None, "", sampled)

    def _parent(self, headers: Sequence[tuple[bytes, bytes]]) -> SpanContext | None:
        given = [value.decode("latin-1") for name, value in headers if name == _PARENT]
        if len(given) != 1:  # it is unknown which of two is valid
            return None
        states = [value.decode("latin-1") for name, value in headers if name == _STATE]
        context = self._propagator.extract({"traceparent": given, "tracestate": states})
        parent = get_current_span(context).get_span_context()
        return parent if parent.is_valid else None


@dataclass(eq=False)
class Traces(SpanExporter):
    """Begins a trace span for each request, and sends the spans of finished requests.

    Spans are built when a request ends and are put into the SDK's queue. This class acts as that queue's
    exporter in order to count each batch on its way to the receiver.

    Attributes:
        exporter: exporter that sends the batches.
        sample_share: fraction of new traces that are sampled.
        release: this server's release.
        on_sent: function called with the number of spans that the receiver accepted.
        on_dropped: function called with the reason and the number of spans that were lost.
    """

    exporter: SpanExporter
    sample_share: float
    release: str
    on_sent: Callable[[int], None]
    on_dropped: Callable[[SpanDropped, int], None]
    max_queued: int = MAX_QUEUED
    max_content: int = MAX_QUEUED_CONTENT

    def __post_init__(self) -> None:
        self.begin = Tracer(self.sample_share).begin
        self._ended = False
        self._lock = threading.Lock()  # for the two attributes below
        self._queued = self._content_size = 0
        self._limits = SpanLimits()  # from the operator's variables, as are attributes of the resource before ours
        ours = Resource.create({SERVICE_NAME: "tuneserve", SERVICE_VERSION: self.release})
        self._resource = ours.merge(OTELResourceDetector().detect())
        self._scope = InstrumentationScope("tuneserve", self.release)
        self._processor = BatchSpanProcessor(
            self,
            max_queue_size=self.max_queued,
            schedule_delay_millis=_EVERY_MS,
            max_export_batch_size=min(_BATCH, self.max_queued),
        )

    def add(self, trace: RequestTrace, record: RequestRecord) -> None:
        """Queue a finished request's span. If the queue is full, the span is dropped and counted.

        On its own, the SDK would silently drop the oldest span.
        """
        limits = self._limits
        attributes = BoundedAttributes(
            limits.max_span_attributes,
            span_attributes(trace, record),
            immutable=False,
            max_value_len=limits.max_span_attribute_length,
        )
        size = _content_size(attributes)
        with self._lock:
            has_place = self._queued < self.max_queued
            fits = self._content_size + size <= self.max_content
            if has_place:
                self._queued += 1
                self._content_size += size if fits else 0
        if not has_place:
            self.drop()
            return
        if not fits:
            for name in CONTENT:
                attributes.pop(name, None)
            self.on_dropped(SpanDropped.CONTENT_LIMIT, 1)
        sampled = TraceFlags(TraceFlags.SAMPLED)
        state = TraceState.from_header([trace.state]) if trace.state else None
        span = ReadableSpan(
            span_name(record),
            SpanContext(trace.trace_id, trace.span_id, False, sampled, state),
            SpanContext(trace.trace_id, trace.parent_id, True, sampled, state) if trace.parent_id else None,
            self._resource,
            attributes,
            kind=SpanKind.SERVER,
            status=span_status(record),
            start_time=trace.started_ns,
            end_time=trace.ended_ns,
            instrumentation_scope=self._scope,
        )
        self._processor.on_end(span)

    def drop(self) -> None:
        """Count a dropped span."""
        self.on_dropped(SpanDropped.QUEUE_FULL, 1)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch of spans, or drop it if the SDK's attempts fail. Called in the thread of the SDK's queue."""
        result = SpanExportResult.FAILURE
        try:
            result = self.exporter.export(spans)
        finally:
            with self._lock:
                self._queued -= len(spans)
                self._content_size -= sum(_content_size(span.attributes or {}) for span in spans)
            if result is SpanExportResult.SUCCESS:
                self.on_sent(len(spans))
            else:
                self.on_dropped(SpanDropped.SEND_FAILED, len(spans))
        return result

    def shutdown(self) -> None:
        """Stop waiting between attempts to send a batch. Any later batch is dropped immediately."""
        if not self._ended:
            self._ended = True
            self.exporter.shutdown()

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Send the queued spans, then stop. Spans that are not accepted within `timeout_s` are lost and counted."""
        # The SDK's own limit is half a minute, and cannot be set.
        ending = threading.Thread(target=self._processor.shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(timeout_s)
        if ending.is_alive():
            self.shutdown()
            log.error("approximately %d spans were not sent before the server stopped", self._queued)


def _content_size(attributes: Mapping[str, AnyValue]) -> int:
    return sum(len(str(attributes.get(name, ""))) for name in CONTENT)
