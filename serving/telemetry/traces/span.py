"""Builds the span for a finished request, following OpenTelemetry's GenAI and HTTP conventions.

Attribute names are written as literals. The conventions package has deprecated the GenAI names, which were
moved to a separate repository (open-telemetry/semantic-conventions-genai) that has not been packaged yet.
Attributes that the conventions do not define begin with `tuneserve.`.
"""

from http import HTTPStatus

from opentelemetry.trace import Status, StatusCode
from opentelemetry.util.types import AttributeValue

from serving.protocols.route import Route
from serving.telemetry.traces.messages import input_messages, output_messages
from serving.telemetry.traces.request_trace import RequestTrace
from svc.store.requests import RequestOutcome, RequestRecord

PROVIDER = "vllm"
CONTENT = INPUT_MESSAGES, OUTPUT_MESSAGES = "gen_ai.input.messages", "gen_ai.output.messages"
_SERVER_FAULTS = frozenset({RequestOutcome.ENGINE_ERROR, RequestOutcome.SERVER_ERROR})


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
