"""Where a request's span belongs: under the client's, or at the beginning of a trace of its own.

What the W3C's Trace Context says of malformed headers is OpenTelemetry's own code.
"""

import logging
from collections.abc import Sequence

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased
from opentelemetry.trace import SpanContext, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.telemetry.traces.request_trace import RequestTrace
from svc.key_secret import hide_secrets

_PARENT, _STATE = b"traceparent", b"tracestate"


class Tracer:
    """Begins traces, and goes on with those of clients.

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
