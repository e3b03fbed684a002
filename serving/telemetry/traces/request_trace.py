"""Trace context of a request, and the span values that are not part of the request's log row.

A `RequestTrace` is created and filled in on the event loop, so it contains only plain values. Another thread builds the
span later. This module imports nothing from OpenTelemetry.
"""

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from svc.store.requests import RequestRecord


class SpanDropped(StrEnum):
    """Reason why a span, or part of it, was not sent."""

    QUEUE_FULL = "queue_full"
    SEND_FAILED = "send_failed"
    """The receiver could not be reached, or rejected the span."""
    CONTENT_LIMIT = "content_limit"
    """The span was sent without its prompt and answer, because too much content was queued."""


@dataclass(slots=True)
class RequestTrace:
    """Trace data of a request: the ids and start time of its span, plus values that are set when the request ends.

    Attributes:
        parent_id: id of the client's span, or None if the trace begins here.
        state: the client's `tracestate`, or an empty string if it is missing or invalid.
        sampled: whether the span is sent.
        started_ns: arrival time of the request, in nanoseconds since 1970.
        ended_ns: end time of the request, in nanoseconds since 1970. The duration is measured with the
            monotonic clock, so it is never negative.
        model: the model name sent by the client, or None if that model is not served.
        stream: whether the client requested server-sent events, or None if unknown.
        queue_s: time spent waiting for admission, in seconds.
        overhead_s: the gateway's own time before the answer began, in seconds, or None if no answer began.
    """

    trace_id: int
    span_id: int
    parent_id: int | None
    state: str
    sampled: bool
    started_ns: int = field(default_factory=time.time_ns)
    ended_ns: int = 0
    model: str | None = None
    stream: bool | None = None
    queue_s: float = 0.0
    overhead_s: float | None = None
    _began_ns: int = field(default_factory=time.perf_counter_ns)

    @property
    def header_lines(self) -> str:
        """Header lines, including line endings, that make the engine's span a child of this request's span."""
        parent = f"traceparent: 00-{self.trace_id:032x}-{self.span_id:016x}-{self.sampled:02x}\r\n"
        return f"{parent}tracestate: {self.state}\r\n" if self.state else parent

    def end(self, *, model: str | None, stream: bool | None, queue_s: float, overhead_s: float | None) -> None:
        """Set the values that are known only after the request, and record the current time as its end time."""
        self.ended_ns = self.started_ns + time.perf_counter_ns() - self._began_ns
        self.model, self.stream, self.queue_s, self.overhead_s = model, stream, queue_s, overhead_s


class SpanSink(Protocol):
    """Builds and sends the spans of completed requests.

    Its methods are called in the thread that writes rows, and never block.
    """

    def add(self, trace: RequestTrace, record: RequestRecord) -> None:
        """Add a completed request's span. `record` includes the redacted content, if content is stored."""

    def drop(self) -> None:
        """Count a span that was lost."""
