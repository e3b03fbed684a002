"""Traces of requests: where each begins, and the span of each that ended on its way to the receiver.

Nothing here waits for the receiver. Spans that it does not take as fast as they come are lost and counted, and so is
the content of spans beyond what may wait. What the W3C's Trace Context says of malformed headers is OpenTelemetry's own
code.
"""

import logging
import threading
from collections.abc import Callable, Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    TraceFlags,
    TraceState,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.telemetry.traces.exporter import CountedExporter
from serving.telemetry.traces.request_trace import RequestTrace, SpanDropped
from serving.telemetry.traces.span import INPUT_MESSAGES, OUTPUT_MESSAGES, span_attributes, span_name, span_status
from svc.identity.key_secret import hide_secrets
from svc.store.requests import RequestRecord

log = logging.getLogger(__name__)

MAX_QUEUED = 4096
MAX_QUEUED_CONTENT = 64 * 2**20
"""Characters of all prompts and answers in it together."""
_BATCH = 64
"""Spans of one request to the receiver. To write them out takes 5 ms, for which Python lets a thread keep the
interpreter: with more, the event loop would have to wait for it several times."""
_EVERY_MS = 2000
_CLOSE_S = 5.0
_PARENT, _STATE = b"traceparent", b"tracestate"


class Tracer:
    """Begins traces, and goes on with those of clients: a span is under the client's, or begins a trace of its own.

    Args:
        sample_share: of the traces that begin here; a client decides for its own.
    """

    def __init__(self, sample_share: float) -> None:
        self._ids = RandomIdGenerator()
        self._sampler = TraceIdRatioBased(sample_share)
        self._propagator = TraceContextTextMapPropagator()
        # It quotes what clients sent, as often as they send it.
        logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)

    def begin(self, headers: Sequence[tuple[bytes, bytes]]) -> RequestTrace:
        """The place of a request that has just come."""
        parent = self._parent(headers)
        span_id = self._ids.generate_span_id()
        if parent is not None:
            state = parent.trace_state.to_header()
            if hide_secrets(state) != state:
                state = ""
            return RequestTrace(parent.trace_id, span_id, parent.span_id, state, parent.trace_flags.sampled)
        trace_id = self._ids.generate_trace_id()
        decision = self._sampler.should_sample(None, trace_id, "").decision
        return RequestTrace(trace_id, span_id, None, "", decision is Decision.RECORD_AND_SAMPLE)

    def _parent(self, headers: Sequence[tuple[bytes, bytes]]) -> SpanContext | None:
        given = [value.decode("latin-1") for name, value in headers if name == _PARENT]
        if len(given) != 1:  # of two nobody knows which one holds
            return None
        states = [value.decode("latin-1") for name, value in headers if name == _STATE]
        context = self._propagator.extract({"traceparent": given, "tracestate": states})
        found = get_current_span(context).get_span_context()
        return found if found.is_valid else None


class Traces:
    """Begins traces, and sends the spans of requests that ended.

    Args:
        exporter: sends batches.
        sample_share: of the traces that begin here.
        release: ours.
        on_sent: hears how many spans the receiver took.
        on_dropped: hears why, and how many were lost.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        *,
        sample_share: float,
        release: str,
        on_sent: Callable[[int], None],
        on_dropped: Callable[[SpanDropped, int], None],
        max_queued: int = MAX_QUEUED,
        max_content: int = MAX_QUEUED_CONTENT,
    ) -> None:
        self.begin = Tracer(sample_share).begin
        self._on_sent = on_sent
        self._on_dropped = on_dropped
        self._max_queued = max_queued
        self._max_content = max_content
        self._lock = threading.Lock()  # of these three
        self._queued = self._content_size = 0
        self._sizes: dict[int, int] = {}  # of content, by the id of its span: the SDK may have cut it
        self._exporter = CountedExporter(exporter, self._done)
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=max_queued,
            schedule_delay_millis=_EVERY_MS,
            max_export_batch_size=min(_BATCH, max_queued),
        )
        ours = Resource.create({SERVICE_NAME: "tuneserve", SERVICE_VERSION: release})
        self._ids = _GivenIds()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,  # what is not sampled does not come here
            resource=ours.merge(OTELResourceDetector().detect()),  # what the operator's variables say holds
            shutdown_on_exit=False,
            id_generator=self._ids,
        )
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("tuneserve", release)

    def add(self, trace: RequestTrace, record: RequestRecord) -> None:
        """Makes the span of a request that ended; by one thread at a time."""
        attributes = span_attributes(trace, record)
        if not self._take_place():
            self.drop()
            return
        size = sum(len(str(attributes.get(name, ""))) for name in (INPUT_MESSAGES, OUTPUT_MESSAGES))
        if size and not self._take_room(trace.span_id, size):
            for name in (INPUT_MESSAGES, OUTPUT_MESSAGES):
                attributes.pop(name, None)
            self._on_dropped(SpanDropped.CONTENT_LIMIT, 1)
        self._ids.trace_id, self._ids.span_id = trace.trace_id, trace.span_id
        span = self._tracer.start_span(
            span_name(record),
            context=_parent(trace),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=trace.started_ns,
        )
        span.set_status(span_status(record))
        span.end(trace.ended_ns)

    def _take_place(self) -> bool:
        """Whether there is one: of a queue that is full, the SDK would forget the oldest and tell nobody."""
        with self._lock:
            if self._queued >= self._max_queued:
                return False
            self._queued += 1
            return True

    def _take_room(self, span_id: int, size: int) -> bool:
        """Whether there is any for content of so many characters."""
        with self._lock:
            if self._content_size + size > self._max_content:
                return False
            self._content_size += size
            self._sizes[span_id] = size
            return True

    def drop(self) -> None:
        """Counts one that is lost."""
        self._on_dropped(SpanDropped.QUEUE_FULL, 1)

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Sends what waits, and ends; what the receiver has not taken after `timeout_s` is lost and counted."""
        # The SDK's own limit is half a minute, and nobody can set it.
        ending = threading.Thread(target=self._processor.shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(timeout_s)
        if ending.is_alive():
            self._exporter.shutdown()
            log.error("about %d spans were not sent in time", self._queued)

    def _done(self, spans: Sequence[ReadableSpan], taken: bool) -> None:
        """Hears of a batch, in the thread that sends."""
        ids = [span.context.span_id for span in spans if span.context]
        with self._lock:
            self._queued -= len(spans)
            self._content_size -= sum(self._sizes.pop(span_id, 0) for span_id in ids)
        if taken:
            self._on_sent(len(spans))
        else:
            self._on_dropped(SpanDropped.SEND_FAILED, len(spans))


class _GivenIds(IdGenerator):
    """The ids that the engine was told of already."""

    trace_id = span_id = 0

    def generate_trace_id(self) -> int:
        """Of a trace that began here."""
        return self.trace_id

    def generate_span_id(self) -> int:
        """Of the next span."""
        return self.span_id


def _parent(trace: RequestTrace) -> Context:
    """The client's span, or none: not whatever else is under way in this thread."""
    if trace.parent_id is None:
        return Context()
    state = TraceState.from_header([trace.state]) if trace.state else None
    client = SpanContext(trace.trace_id, trace.parent_id, True, TraceFlags(TraceFlags.SAMPLED), state)
    return set_span_in_context(NonRecordingSpan(client), Context())
