"""Traces requests: begins a span for each request, and sends it to the receiver when the request has finished.

No request waits for the receiver. If spans are created faster than the receiver accepts them, excess spans are dropped
and counted, as is content beyond the queue's limit. OpenTelemetry's own code handles malformed Trace Context headers.

Attribute names are written as literals. The conventions package has deprecated the GenAI names, which were
moved to a separate repository (open-telemetry/semantic-conventions-genai) that has not been packaged yet.
Attributes that the conventions do not define begin with `tuneserve.`.

The input is redacted content from the request log: the prompt as JSON in its route's format, and the answer
as text.
"""

import json
import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AnyValue, AttributeValue

from serving.protocols.route import Route
from serving.telemetry.traces.request_trace import RequestTrace, SpanDropped
from svc.dataset.schema.tool_calls import split_calls
from svc.identity.key_secret import hide_secrets
from svc.store.requests import RequestOutcome, RequestRecord

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
PROVIDER = "vllm"
CONTENT = INPUT_MESSAGES, OUTPUT_MESSAGES = "gen_ai.input.messages", "gen_ai.output.messages"
_SERVER_FAULTS = frozenset({RequestOutcome.ENGINE_ERROR, RequestOutcome.SERVER_ERROR})


def input_messages(prompt: str) -> str:
    """Return a prompt's messages as JSON.

    Args:
        prompt: JSON of chat messages, or of a plain completion's prompt.
    """
    turns = json.loads(prompt)
    turns = turns if isinstance(turns, list) else [turns]
    return _json([_message(turn) for turn in turns])


def output_messages(answer: str, finish_reason: str | None) -> str:
    """Return a JSON list that contains the answer as its only message.

    If the answer is empty, the message has no parts.
    """
    text, calls = split_calls(answer)
    parts = [*([_text(text)] if text else []), *(_call(None, name, arguments) for name, arguments in calls)]
    return _json([{"role": "assistant", "parts": parts, "finish_reason": finish_reason or "error"}])


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        return {"role": "user", "parts": [_text(str(turn))]}
    role = str(turn.get("role") or _role(turn))
    if "role" not in turn:  # an item of responses that is not a message
        return {"role": role, "parts": [_part(turn)]}
    if role == "tool":
        return {"role": role, "parts": [_result(turn.get("tool_call_id"), turn.get("content"))]}
    content = turn.get("content")
    content = content if isinstance(content, list) else [content] if content is not None else []
    calls = turn.get("tool_calls")
    return {"role": role, "parts": [_part(part) for part in [*content, *(calls if isinstance(calls, list) else [])]]}


def _role(item: dict[str, Any]) -> str:
    return "tool" if str(item.get("type")).endswith("_output") else "assistant"


def _part(part: Any) -> dict[str, Any]:
    """Return a message part in the format of the GenAI conventions.

    Texts, tool calls and tool results are converted. Other parts are returned unchanged.
    """
    if not isinstance(part, dict):
        return _text(str(part))
    match part.get("type"):
        case "text" | "input_text" | "output_text":
            return _text(str(part.get("text") or ""))
        case "function" if isinstance(function := part.get("function"), dict):
            return _call(part.get("id"), function.get("name"), function.get("arguments"))
        case "function_call":
            return _call(part.get("call_id"), part.get("name"), part.get("arguments"))
        case "tool_use":
            return _call(part.get("id"), part.get("name"), part.get("input"))
        case "function_call_output":
            return _result(part.get("call_id"), part.get("output"))
        case "tool_result":
            return _result(part.get("tool_use_id"), part.get("content"))
    return {**part, "type": str(part.get("type") or "unknown")}


def _text(content: str) -> dict[str, Any]:
    return {"type": "text", "content": content}


def _call(id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_call", "id": id, "name": str(name or ""), "arguments": arguments}


def _result(id: Any, response: Any) -> dict[str, Any]:
    return {"type": "tool_call_response", "id": id, "response": response}


def _json(messages: list[dict[str, Any]]) -> str:
    """Return the messages as JSON without lone surrogates, because a single surrogate would make a whole batch of spans
    fail.
    """
    return json.dumps(messages, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")


def operation(record: RequestRecord) -> str:
    """Return the operation name that OpenTelemetry's conventions define for the request's route."""
    return "text_completion" if record.route == Route.COMPLETIONS else "chat"


def span_name(record: RequestRecord) -> str:
    """Return the span's name, which comes from a bounded set."""
    return f"{operation(record)} {record.model}"


def span_status(record: RequestRecord) -> Status:
    """Return an error status if the server is at fault. Client errors and disconnects do not count as errors."""
    if record.outcome in _SERVER_FAULTS or record.status >= 500:
        return Status(StatusCode.ERROR, record.reason)
    return Status(StatusCode.UNSET)


def span_attributes(trace: RequestTrace, record: RequestRecord) -> dict[str, AttributeValue]:
    """Return all span attributes that are known for a request."""
    # No status was sent to a client that left before its answer began.
    sent = record.outcome is not RequestOutcome.CLIENT_GONE or record.status == HTTPStatus.OK
    attributes: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": operation(record),
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": trace.model,
        "gen_ai.request.stream": trace.stream,
        "gen_ai.request.temperature": record.temperature,
        "gen_ai.request.max_tokens": record.max_tokens,
        "gen_ai.response.model": str(record.version) if record.version else None,
        "gen_ai.response.finish_reasons": (record.finish_reason,) if record.finish_reason else None,
        "gen_ai.response.time_to_first_chunk": record.first_token_seconds,
        "gen_ai.usage.input_tokens": record.tokens_in,
        "gen_ai.usage.output_tokens": record.tokens_out,
        "http.request.method": "POST",
        "http.route": record.route,
        "http.response.status_code": record.status if sent else None,
        "error.type": record.reason,
        "tuneserve.request.id": record.request_id,
        "tuneserve.client_request.id": record.client_request_id,
        "tuneserve.key.id": record.key_id,
        "tuneserve.model.version": record.version.number if record.version else None,
        "tuneserve.model.format": record.format.value if record.format else None,
        "tuneserve.outcome": record.outcome.value,
        "tuneserve.queue.duration": trace.queue_s,
        "tuneserve.gateway.overhead": trace.overhead_s,
        INPUT_MESSAGES: None if record.prompt is None else input_messages(record.prompt),
        OUTPUT_MESSAGES: None if record.answer is None else output_messages(record.answer, record.finish_reason),
    }
    return {name: value for name, value in attributes.items() if value is not None}


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
