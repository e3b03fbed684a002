"""Tests that each completion sends one span to a real receiver, under the client's span if there is one."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine as Store

from serving.protocols.route import Route
from svc.settings.monitoring import RequestLogSettings, TelemetrySettings
from tests.serving.control import until
from tests.serving.engine_double import Fault
from tests.serving.http.keyed_service import BODIES, KeyedService
from tests.serving.otlp_receiver import ERROR, SERVER, UNSET, OtlpReceiver, ReceivedSpan, otlp_receiver
from tests.serving.service import CHAT, CHAT_PATH, NAME, STREAM, Service

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CLIENTS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1,other=x"}
CONTENT = ("gen_ai.input.messages", "gen_ai.output.messages")
SECRET = "Basic cHVibGljOnNlY3JldA=="


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as receiver:
        yield receiver


class Traced:
    """A service that sends its spans to a receiver.

    Args:
        settings: settings of the service.
    """

    def __init__(self, folder: Path, store: Store, receiver: OtlpReceiver, **telemetry: Any) -> None:
        self.folder, self.store, self.receiver = folder, store, receiver
        self.telemetry = TelemetrySettings(otlp_endpoint=receiver.url, **telemetry)
        self.keeping = RequestLogSettings()
        self.settings: dict[str, Any] = {}

    @asynccontextmanager
    async def run(self) -> AsyncIterator[tuple[Service, httpx.AsyncClient]]:
        """Run the service and yield it with a client. All spans have reached the receiver afterwards."""
        service = KeyedService(
            self.folder, store=self.store, keeping=self.keeping, telemetry=self.telemetry, **self.settings
        )
        async with service.run(), service.socket_client() as client:
            yield service, client

    async def span_of(self, body: Any, path: str = CHAT_PATH, **headers: str) -> ReceivedSpan:
        """Send a request and return its single span."""
        async with self.run() as (_, client):
            await client.post(path, json=body, headers=headers)
        [span] = self.receiver.spans
        return span


@pytest.fixture
def traced(socket_folder: Path, store: Store, receiver: OtlpReceiver) -> Traced:
    return Traced(socket_folder, store, receiver)


@pytest.mark.slow
@pytest.mark.parametrize("route", Route)
async def test_span_of_a_successful_answer_is_complete(traced: Traced, route: Route) -> None:
    span = await traced.span_of(BODIES[route], route.value)
    operation = "text_completion" if route is Route.COMPLETIONS else "chat"
    assert (span.name, span.kind, span.status) == (f"{operation} {NAME}", SERVER, UNSET)
    assert (span.parent, span.state) == ("", "")
    attributes = dict(span.attributes)
    assert attributes.pop("tuneserve.request.id").startswith("req-")
    assert attributes.pop("tuneserve.queue.duration") >= 0
    assert 0 < attributes.pop("tuneserve.gateway.overhead") < span.seconds < 5
    assert attributes.pop("gen_ai.usage.input_tokens") > 0
    attributes.pop("gen_ai.request.max_tokens", None)
    assert attributes == {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": NAME,
        "gen_ai.request.stream": False,
        "gen_ai.response.model": f"{NAME}@1",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.output_tokens": 4,
        "http.request.method": "POST",
        "http.route": route.value,
        "http.response.status_code": 200,
        "tuneserve.model.version": 1,
        "tuneserve.model.format": "merged",
        "tuneserve.outcome": "complete",
    }


@pytest.mark.slow
@pytest.mark.parametrize("route", Route)
async def test_stream_span_includes_the_time_to_first_token(traced: Traced, route: Route) -> None:
    span = await traced.span_of({**BODIES[route], "stream": True}, route.value)
    assert span.attributes["gen_ai.request.stream"] is True
    assert 0 < span.attributes["gen_ai.response.time_to_first_chunk"] <= span.seconds
    assert span.attributes["gen_ai.usage.output_tokens"] == 4


@pytest.mark.slow
async def test_span_includes_the_request_parameters(traced: Traced) -> None:
    body = {**CHAT, "model": f"{NAME}@1", "temperature": 0.5, "max_tokens": 9}
    span = await traced.span_of(body, **{"x-request-id": "mine"})
    asked = ("gen_ai.request.model", "gen_ai.request.temperature", "gen_ai.request.max_tokens")
    assert [span.attributes[name] for name in asked] == [f"{NAME}@1", 0.5, 9]
    assert span.attributes["tuneserve.client_request.id"] == "mine"
    assert span.name == f"chat {NAME}"


async def test_gateway_span_is_child_of_client_span_and_parent_of_engine_span(traced: Traced) -> None:
    async with traced.run() as (service, client):
        await client.post(CHAT_PATH, json=CHAT, headers=CLIENTS)
    [span], [head] = traced.receiver.spans, service.double.heads
    assert (span.trace, span.parent, span.state) == (TRACE, PARENT, "vendor=1,other=x")
    assert head["traceparent"] == f"00-{TRACE}-{span.id}-01"
    assert head["tracestate"] == "vendor=1,other=x"


@pytest.mark.slow
async def test_each_request_starts_a_new_trace_if_the_client_sends_no_trace_parent(traced: Traced) -> None:
    async with traced.run() as (service, client):
        await client.post(CHAT_PATH, json=CHAT)
        await client.post(CHAT_PATH, json=CHAT)
    first, second = traced.receiver.spans
    assert first.trace != second.trace and first.id != second.id
    passed = [head["traceparent"] for head in service.double.heads]
    assert passed == [f"00-{span.trace}-{span.id}-01" for span in (first, second)]
    assert all("tracestate" not in head for head in service.double.heads)


async def test_malformed_trace_parent_is_ignored(traced: Traced) -> None:
    span = await traced.span_of(CHAT, traceparent=f"00-{TRACE.upper()}-{PARENT}-01", tracestate="vendor=1")
    assert (span.parent, span.state) == ("", "")
    assert span.trace != TRACE


async def test_trace_not_sampled_by_the_client_is_sampled_by_neither_the_gateway_nor_the_engine(traced: Traced) -> None:
    async with traced.run() as (service, client):
        await client.post(CHAT_PATH, json=CHAT, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert traced.receiver.spans == []
    assert service.double.heads[0]["traceparent"].startswith(f"00-{TRACE}-")
    assert service.double.heads[0]["traceparent"].endswith("-00")
    assert PARENT not in service.double.heads[0]["traceparent"]


async def test_trace_sample_share_applies_only_to_traces_started_by_the_gateway(
    socket_folder: Path, store: Store, receiver: OtlpReceiver
) -> None:
    traced = Traced(socket_folder, store, receiver, sample_share=0.0)
    async with traced.run() as (service, client):
        await client.post(CHAT_PATH, json=CHAT)
        await client.post(CHAT_PATH, json=CHAT, headers=CLIENTS)
    assert [span.trace for span in receiver.spans] == [TRACE]
    assert service.double.heads[0]["traceparent"].endswith("-00")


async def test_sensitive_prompt_content_is_redacted_in_spans(traced: Traced) -> None:
    traced.keeping = RequestLogSettings(content_share=1.0, redact=("tulip",))
    messages = [{"role": "system", "content": "a tulip"}, {"role": "user", "content": "mail a@b.de"}]
    span = await traced.span_of({**CHAT, "messages": messages})
    asked, answered = (json.loads(span.attributes[name]) for name in CONTENT)
    assert asked == [
        {"role": "system", "parts": [{"type": "text", "content": "a [redacted]"}]},
        {"role": "user", "parts": [{"type": "text", "content": "mail [mail]"}]},
    ]
    [answer] = answered
    assert (answer["role"], answer["finish_reason"]) == ("assistant", "length")
    assert answer["parts"][0]["content"].startswith("1.0")


async def test_spans_contain_no_content_if_the_content_share_is_zero(traced: Traced) -> None:
    span = await traced.span_of({**CHAT, "messages": [{"role": "user", "content": "a tulip"}]})
    assert not {*CONTENT} & {*span.attributes}
    assert b"tulip" not in b"".join(traced.receiver.bodies)


async def test_overlong_content_is_omitted_from_the_span(traced: Traced) -> None:
    traced.keeping = RequestLogSettings(content_share=1.0, max_content_kib=1)
    span = await traced.span_of({**CHAT, "messages": [{"role": "user", "content": "a " * 900}]})
    assert not {*CONTENT} & {*span.attributes}


def errors(span: ReceivedSpan) -> tuple[int | None, str, int]:
    return span.attributes.get("http.response.status_code"), span.attributes["error.type"], span.status


async def test_client_error_does_not_mark_the_span_as_an_error(traced: Traced) -> None:
    span = await traced.span_of({**CHAT, "prompt_logprobs": 1})
    assert errors(span) == (400, "invalid_request", UNSET)
    assert span.attributes["tuneserve.outcome"] == "refused"


@pytest.mark.parametrize(("model", "shown"), [("\ud800 a@b.de", "unknown"), (f"{NAME}@9\ud800", NAME)])
async def test_span_omits_the_requested_model_name_if_the_model_does_not_exist(
    traced: Traced, model: str, shown: str
) -> None:
    async with traced.run() as (_, client):
        await client.post(CHAT_PATH, content=json.dumps({**CHAT, "model": model}), headers=_JSON)
    [span] = traced.receiver.spans
    assert errors(span) == (404, "model_not_found", UNSET)
    assert (span.name, span.attributes["gen_ai.request.model"]) == (f"chat {shown}", shown)


_JSON = {"content-type": "application/json"}


@pytest.mark.slow
async def test_span_of_a_request_rejected_for_lack_of_a_slot_includes_the_reason(traced: Traced) -> None:
    traced.settings = {"max_running": 1, "max_queued": 0}
    async with traced.run() as (service, client):
        service.double.token_delay_s, service.double.tokens = 0.01, 100_000
        async with client.stream("POST", CHAT_PATH, json=STREAM):
            await until(lambda: service.double.running == 1)
            assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 429
    refused = next(span for span in traced.receiver.spans if span.attributes.get("http.response.status_code") == 429)
    assert errors(refused) == (429, "overloaded", UNSET)
    assert "gen_ai.response.model" not in refused.attributes


async def test_span_has_an_error_status_if_the_engine_is_down(traced: Traced) -> None:
    async with traced.run() as (service, client):
        service.admission.unavailable("it is being restarted")
        assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 503
    [span] = traced.receiver.spans
    assert errors(span) == (503, "engine_unavailable", ERROR)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "body", "expected"),
    [
        (Fault.DIE_BEFORE_ANSWER, CHAT, (503, "engine_died", ERROR)),
        (Fault.DIE_IN_STREAM, STREAM, (200, "engine_died", ERROR)),
        (Fault.ERROR_IN_STREAM, STREAM, (200, "engine_error", ERROR)),
    ],
)
async def test_span_is_an_error_if_the_engine_fails(traced: Traced, fault: Fault, body: Any, expected: Any) -> None:
    async with traced.run() as (service, client):
        service.double.fault = fault
        await client.post(CHAT_PATH, json=body)
    [span] = traced.receiver.spans
    assert errors(span) == expected
    assert span.attributes["gen_ai.response.model"] == f"{NAME}@1"


@pytest.mark.slow
@pytest.mark.parametrize(("body", "status"), [(CHAT, None), (STREAM, 200)], ids=["before", "within"])
async def test_span_has_outcome_client_gone_if_the_client_disconnects(
    traced: Traced, body: Any, status: int | None
) -> None:
    async with traced.run() as (service, client):
        service.double.token_delay_s, service.double.tokens = 0.01, 100_000
        asking = asyncio.create_task(_read_some(client, body))
        await until(lambda: service.double.running == 1)
        await asyncio.sleep(0.05)
        asking.cancel()
        await asyncio.wait({asking})
        await until(lambda: service.double.running == 0)
    [span] = traced.receiver.spans
    assert errors(span) == (status, "client_gone", UNSET)


async def _read_some(client: httpx.AsyncClient, body: Any) -> None:
    async with client.stream("POST", CHAT_PATH, json=body) as answer:
        async for _ in answer.aiter_raw():
            pass


@pytest.mark.slow
async def test_authorized_request_creates_a_span_with_its_key_id_and_an_unauthorized_request_creates_none(
    socket_folder: Path, store: Store, receiver: OtlpReceiver
) -> None:
    traced = Traced(socket_folder, store, receiver)
    traced.keeping = RequestLogSettings(content_share=1.0)
    async with traced.run() as (service, client):
        assert isinstance(service, KeyedService)
        issued = service.key()
        assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 401
        body = {**CHAT, "messages": [{"role": "user", "content": f"my key is {issued.secret}"}]}
        headers = {"authorization": f"Bearer {issued.secret}", "traceparent": CLIENTS["traceparent"]}
        headers |= {"tracestate": f"vendor={issued.secret}"}
        assert (await client.post(CHAT_PATH, json=body, headers=headers)).status_code == 200
    [span] = receiver.spans
    assert span.attributes["tuneserve.key.id"] == issued.key.id
    assert span.state == ""
    assert issued.secret[12:36].encode() not in b"".join(receiver.bodies)
    assert "my key is [key]" in span.attributes["gen_ai.input.messages"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("endpoint", "path"), [("", "/v1/traces"), ("/api/public/otel/", "/api/public/otel/v1/traces"), ("/v1/traces",) * 2]
)
async def test_headers_from_the_standard_otlp_environment_variable_are_sent_to_the_receiver(
    traced: Traced, monkeypatch: pytest.MonkeyPatch, endpoint: str, path: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"Authorization={SECRET},x-project=a%20b")
    traced.telemetry = TelemetrySettings(otlp_endpoint=traced.receiver.url + endpoint)
    await traced.span_of(CHAT)
    [head] = traced.receiver.heads
    assert (head["authorization"], head["x-project"]) == (SECRET, "a b")
    assert head["content-type"] == "application/x-protobuf"
    assert traced.receiver.paths == [path]


@pytest.mark.slow
async def test_resource_attributes_are_read_from_the_environment(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    span = await traced.span_of(CHAT)
    assert (span.resource["service.name"], span.resource["deployment.environment.name"]) == ("tuneserve", "test")
    assert span.resource["service.version"]


async def test_sent_spans_are_counted(traced: Traced) -> None:
    async with traced.run() as (service, client):
        await client.post(CHAT_PATH, json=CHAT)
    assert service.count("svc_spans_total") == 1


@pytest.mark.slow
async def test_requests_are_unaffected_if_the_trace_receiver_is_down(
    traced: Traced, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization={SECRET}")
    monkeypatch.setattr("serving.telemetry.traces.exporter._LIMIT._next", 0.0)
    caplog.set_level(logging.DEBUG)
    traced.telemetry = TelemetrySettings(otlp_endpoint="http://127.0.0.1:1")
    async with traced.run() as (service, client):
        for _ in range(20):
            assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200
        assert service.traces
        await asyncio.to_thread(service.request_log.flush, 5)
        began = time.monotonic()
        await asyncio.to_thread(service.traces.close, 0.5)
        assert time.monotonic() - began < 2
        await until(lambda: service.count("svc_spans_dropped_total", reason="send_failed") == 20)
    records = [record for record in caplog.records if record.name.startswith("opentelemetry.")]
    assert len([record for record in records if record.levelno >= logging.WARNING]) == 1
    assert SECRET not in caplog.text


@pytest.mark.slow
async def test_unresponsive_trace_receiver_does_not_delay_requests(
    socket_folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.telemetry.traces.traces._EVERY_MS", 10)
    with otlp_receiver(answers=False) as receiver:
        traced = Traced(socket_folder, store, receiver)
        async with traced.run() as (service, client):
            for _ in range(5):
                assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200
            assert service.traces
            await asyncio.to_thread(service.request_log.flush, 5)
            began = time.monotonic()
            await asyncio.to_thread(service.traces.close, 0.3)
            assert time.monotonic() - began < 2


@pytest.mark.parametrize("status", [401, 413])
async def test_rejected_spans_are_counted(traced: Traced, status: int) -> None:
    traced.receiver.status = status
    async with traced.run() as (service, client):
        await client.post(CHAT_PATH, json=CHAT)
    assert service.count("svc_spans_dropped_total", reason="send_failed") == 1
    assert service.count("svc_spans_total") == 0


async def test_engine_gets_no_trace_headers_if_no_trace_receiver_is_configured(
    service: Service, client: httpx.AsyncClient
) -> None:
    await client.post(CHAT_PATH, json=CHAT, headers=CLIENTS)
    assert "traceparent" not in service.double.heads[0]
