"""The place of one request in its trace, and what its span says beyond the request's row.

Made and filled in on the event loop, so it is nothing but numbers; the span is made of it later, in another thread.
Loads nothing of OpenTelemetry.
"""

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from svc.store.requests import RequestRecord


class SpanDropped(StrEnum):
    """Why a span was not sent, or not all of it."""

    QUEUE_FULL = "queue_full"
    SEND_FAILED = "send_failed"
    """The receiver could not be reached, or refused it."""
    CONTENT_LIMIT = "content_limit"
    """The span is sent, its prompt and answer are not: too many wait."""


@dataclass(slots=True)
class RequestTrace:
    """What the span of one request begins with, and in the end what the gateway knows of it.

    Attributes:
        parent_id: the client's span; None where the trace begins here.
        state: the client's `tracestate`, valid; empty where there is none.
        sampled: the span is sent.
        started_ns: when the request came, since 1970.
        ended_ns: when it ended, likewise; by the monotonic clock, so that a clock that is set makes no span negative.
        model: as the client named it, where that is a model that is served; None otherwise.
        stream: the client wants server-sent events; None where nobody knows.
        queue_s: waited for a place, seconds.
        overhead_s: the gateway's own time before the answer began, seconds; None where none did.
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
        """What tells the engine that its span belongs under this one: whole lines of an HTTP head."""
        parent = f"traceparent: 00-{self.trace_id:032x}-{self.span_id:016x}-{self.sampled:02x}\r\n"
        return f"{parent}tracestate: {self.state}\r\n" if self.state else parent

    def end(self, *, model: str | None, stream: bool | None, queue_s: float, overhead_s: float | None) -> None:
        """Takes what is known at the request's end, which is now."""
        self.ended_ns = self.started_ns + time.perf_counter_ns() - self._began_ns
        self.model, self.stream, self.queue_s, self.overhead_s = model, stream, queue_s, overhead_s


class SpanSink(Protocol):
    """Makes spans of requests that ended, and sends them. Called in the thread that writes rows, and never waits."""

    def add(self, trace: RequestTrace, record: RequestRecord) -> None:
        """Takes a request, with its redacted content where that is kept."""

    def drop(self) -> None:
        """Hears of one that is lost."""
