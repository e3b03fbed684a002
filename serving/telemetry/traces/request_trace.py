"""The position of one request in its trace, and the values of its span that are not in the request's row.

Created and filled in on the event loop, so it has only plain values; another thread builds the span later.
Imports nothing from OpenTelemetry.
"""

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from svc.store.requests import RequestRecord


class SpanDropped(StrEnum):
    """Why a span, or a part of it, was not sent."""

    QUEUE_FULL = "queue_full"
    SEND_FAILED = "send_failed"
    """The receiver could not be reached, or rejected the span."""
    CONTENT_LIMIT = "content_limit"
    """The span is sent without its prompt and answer: too much content is queued."""


@dataclass(slots=True)
class RequestTrace:
    """The ids and start of one request's span and, after the request's end, the gateway's values for the span.

    Attributes:
        parent_id: id of the client's span; None if the trace begins here.
        state: the client's `tracestate`; empty if there is none or it is invalid.
        sampled: whether the span is sent.
        started_ns: arrival of the request, nanoseconds since 1970.
        ended_ns: end of the request, likewise; measured by the monotonic clock, so that no span is negative.
        model: the model name that the client sent, if that model is served; None otherwise.
        stream: whether the client wants server-sent events; None if unknown.
        queue_s: wait for admission, seconds.
        overhead_s: the gateway's own time before the answer began, seconds; None if no answer began.
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
        """Header lines, with line ends, that make the engine's span a child of this one."""
        parent = f"traceparent: 00-{self.trace_id:032x}-{self.span_id:016x}-{self.sampled:02x}\r\n"
        return f"{parent}tracestate: {self.state}\r\n" if self.state else parent

    def end(self, *, model: str | None, stream: bool | None, queue_s: float, overhead_s: float | None) -> None:
        """Set the values that are known at the request's end, which is now."""
        self.ended_ns = self.started_ns + time.perf_counter_ns() - self._began_ns
        self.model, self.stream, self.queue_s, self.overhead_s = model, stream, queue_s, overhead_s


class SpanSink(Protocol):
    """Builds and sends the spans of ended requests. Called in the thread that writes rows; never waits."""

    def add(self, trace: RequestTrace, record: RequestRecord) -> None:
        """Add a request, with its redacted content if that is stored."""

    def drop(self) -> None:
        """Count a span that is lost."""
