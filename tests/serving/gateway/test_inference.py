"""Tests the data plane in front of an engine double on a real socket."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.gateway.delivery import AnswerBuffers
from svc.engine.vllm.connection_pool import EngineConnections
from tests.serving.admission.opened import admitted
from tests.serving.control import until
from tests.serving.engine_double import Fault, running_engine
from tests.serving.keyed import principal
from tests.serving.service import CHAT, CHAT_PATH, NAME, STREAM, TWO, Service, closed, connections, error_of
from tests.svc.engine.raw_server import LAST_CHUNK, Peer, chunk, raw_server, say
from tests.svc.engine.raw_server import STREAM as STREAMED

MANY = 6_000
"""Number of tokens; they take more bytes than the buffers between engine and client hold."""
COMPLETION = {"model": NAME, "prompt": "one two three"}


def chunks_of(text: str) -> list[Any]:
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def small_buffers(*, max_bytes: int = 2**28, client_timeout_s: float = 30.0) -> AnswerBuffers:
    """Return answer buffers that allow 64 KiB per answer."""
    return AnswerBuffers(max_bytes=max_bytes, max_answer_bytes=64 * 1024, client_timeout_s=client_timeout_s)


def ended(service: Service, status: str, outcome: str) -> float:
    """Return how many requests to version 1 had the given status and outcome."""
    labels = {"model": NAME, "version": "1", "route": CHAT_PATH, "status": status, "outcome": outcome}
    return service.count("svc_requests_total", **labels)


class TestAnswers:
    async def test_engine_response_bytes_are_forwarded_unchanged(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        answer = await client.post(CHAT_PATH, json=CHAT)
        body = {**CHAT, "model": NAME}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(service.double), base_url="http://e") as engine:
            assert answer.content == (await engine.post(CHAT_PATH, json=body)).content

    async def test_engine_always_receives_its_own_model_name(self, service: Service, client: httpx.AsyncClient) -> None:
        for model in (NAME, f"{NAME}@1", f"{NAME}@production"):
            assert (await client.post(CHAT_PATH, json={**CHAT, "model": model})).status_code == 200
        assert {request["model"] for request in service.double.requests} == {NAME}

    @pytest.mark.parametrize("path", [CHAT_PATH, "/v1/completions"])
    async def test_chat_and_completion_routes_are_both_served(self, client: httpx.AsyncClient, path: str) -> None:
        answer = await client.post(path, json=CHAT | COMPLETION)
        assert answer.json()["usage"]["completion_tokens"] == 4

    async def test_response_names_the_version_that_generated_the_answer(self, client: httpx.AsyncClient) -> None:
        assert (await client.post(CHAT_PATH, json=CHAT)).headers["x-model-version"] == f"{NAME}@1"

    async def test_queued_request_that_names_no_version_is_answered_by_the_new_version_after_a_swap(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        async with closed(service.admission):
            task = asyncio.create_task(client.post(CHAT_PATH, json=CHAT))
            await until(lambda: service.admission.queued == 1)
            service.double.weights = service.double.cached_weights = "/models/tuned/2"
            service.load(TWO)
        answer = await task
        assert answer.headers["x-model-version"] == f"{NAME}@2"
        assert answer.json()["choices"][0]["message"]["content"].startswith("2.0")

    async def test_queued_request_for_the_old_version_fails_after_a_swap(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        async with closed(service.admission):
            task = asyncio.create_task(client.post(CHAT_PATH, json={**CHAT, "model": f"{NAME}@1"}))
            await until(lambda: service.admission.queued == 1)
            service.load(TWO)
        assert error_of(await task)["code"] == "model_not_found"

    async def test_completed_requests_and_tokens_are_counted(self, service: Service, client: httpx.AsyncClient) -> None:
        await client.post(CHAT_PATH, json=CHAT)
        await client.post(CHAT_PATH, json=STREAM)
        version = {"model": NAME, "version": "1"}
        assert ended(service, "200", "complete") == 2
        assert service.count("svc_tokens_total", **version, direction="in") == 6
        assert service.count("svc_tokens_total", **version, direction="out") == 8
        assert service.count("svc_time_to_first_token_seconds_count", **version) == 1
        assert service.count("svc_time_between_tokens_seconds_count", **version) == 3


class TestOverhead:
    """Tests the gateway's own time in milliseconds, as given in the response header."""

    @pytest.mark.slow
    async def test_overhead_header_excludes_engine_time(self, service: Service, client: httpx.AsyncClient) -> None:
        service.double.token_delay_s = 0.2
        answer = await client.post(CHAT_PATH, json=CHAT)
        assert float(answer.headers["openai-processing-ms"]) >= 200
        assert 0 < float(answer.headers["x-svc-overhead-ms"]) < 150

    async def test_streamed_responses_include_the_overhead_header(self, client: httpx.AsyncClient) -> None:
        answer = await client.post(CHAT_PATH, json=STREAM)
        assert 0 < float(answer.headers["x-svc-overhead-ms"]) < 150

    @pytest.mark.slow
    async def test_overhead_excludes_waiting_for_the_rest_of_the_first_event(
        self, service: Service, client: httpx.AsyncClient, socket_folder: Path
    ) -> None:
        async def reply(peer: Peer) -> None:
            await peer.say(STREAMED)
            for part in (b"data: {", b'"choices":[]', b"}\n\ndata: [DONE]\n\n"):
                await asyncio.sleep(0.1)
                await peer.say(chunk(part))
            await peer.say(LAST_CHUNK)

        path = socket_folder / "parts.sock"
        async with raw_server(path, reply):
            with closing(EngineConnections(path, silence_s=5)) as service.http:
                answer = await client.post(CHAT_PATH, json=STREAM)
        assert answer.text.endswith("data: [DONE]\n\n")
        assert float(answer.headers["openai-processing-ms"]) >= 300
        assert 0 < float(answer.headers["x-svc-overhead-ms"]) < 90

    @pytest.mark.slow
    async def test_overhead_excludes_waiting_for_a_slot(self, service: Service, client: httpx.AsyncClient) -> None:
        async with closed(service.admission):
            asking = asyncio.create_task(client.post(CHAT_PATH, json=CHAT))
            await asyncio.sleep(0.3)
        answer = await asking
        assert float(answer.headers["openai-processing-ms"]) >= 250
        assert 0 < float(answer.headers["x-svc-overhead-ms"]) < 150


class TestStreams:
    async def test_token_count_chunk_is_dropped_if_the_client_did_not_request_it(
        self, client: httpx.AsyncClient
    ) -> None:
        chunks = chunks_of((await client.post(CHAT_PATH, json=STREAM)).text)
        assert chunks[-1] == "[DONE]"
        assert all(chunk["choices"] for chunk in chunks[:-1])

    async def test_token_count_chunk_is_forwarded_if_the_client_requested_it(self, client: httpx.AsyncClient) -> None:
        answer = await client.post(CHAT_PATH, json={**STREAM, "stream_options": {"include_usage": True}})
        *_, usage, done = chunks_of(answer.text)
        assert (usage["choices"], usage["usage"]["completion_tokens"], done) == ([], 4, "[DONE]")

    async def test_first_token_is_sent_before_the_last_is_generated(
        self, service: Service, live: httpx.AsyncClient
    ) -> None:
        service.double.tokens = 1000
        service.double.token_delay_s = 0.01
        async with live.stream("POST", CHAT_PATH, json=STREAM) as answer:
            async for line in answer.aiter_lines():
                if "1.0" in line:
                    break
            assert service.double.running == 1

    @pytest.mark.slow
    async def test_stream_holds_its_slot_until_it_ends(self, service: Service, live: httpx.AsyncClient) -> None:
        service.double.token_delay_s = 0.05
        async with live.stream("POST", CHAT_PATH, json=STREAM) as answer:
            lines = answer.aiter_lines()
            while "1.1" not in await anext(lines):
                pass
            assert service.admission.running == 1
            assert "data: [DONE]" in [line async for line in lines]
        await until(lambda: not service.admission.running)


class TestRefusals:
    async def test_request_for_an_unknown_model_returns_404(self, service: Service, client: httpx.AsyncClient) -> None:
        answer = await client.post(CHAT_PATH, json={**CHAT, "model": "x" * 5000})
        assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")
        assert NAME in error_of(answer)["message"]
        assert len(answer.content) < 500
        labels = {"model": "unknown", "version": "", "route": CHAT_PATH, "status": "404", "outcome": "refused"}
        assert service.count("svc_requests_total", **labels) == 1

    async def test_error_is_attributed_to_the_model_if_the_requested_version_is_not_loaded(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        await client.post(CHAT_PATH, json={**CHAT, "model": f"{NAME}@99"})
        assert service.failed("model_not_found", NAME, "") == 1

    async def test_error_is_attributed_to_the_model_if_no_version_is_loaded_yet(self, socket_folder: Path) -> None:
        async with Service(socket_folder).run() as service, service.client() as client:
            service.names.served = None
            assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 503
        assert service.failed("engine_unavailable", NAME, "") == 1

    async def test_unknown_model_names_create_no_metric_series(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        await client.post(CHAT_PATH, json={**CHAT, "model": "first"})
        before = (await client.get("/metrics")).text.count("\n")
        for number in range(20):
            await client.post(CHAT_PATH, json={**CHAT, "model": f"other-{number}"})
            await client.post(f"/v1/{number}")
        assert (await client.get("/metrics")).text.count("\n") == before

    @pytest.mark.parametrize(
        ("body", "code", "param"),
        [
            (b"{", "invalid_json", None),
            (b"{}", "invalid_request", "model"),
            (b'{"model": "tuned", "prompt_logprobs": 1}', "invalid_request", "prompt_logprobs"),
        ],
    )
    async def test_error_for_an_invalid_body_has_a_code_and_names_any_parameter_at_fault(
        self, service: Service, client: httpx.AsyncClient, body: bytes, code: str, param: str | None
    ) -> None:
        answer = await client.post(CHAT_PATH, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, error_of(answer)["code"], error_of(answer)["param"]) == (400, code, param)
        assert service.double.calls == []
        assert service.failed_anywhere(code) == 1

    async def test_oversized_body_is_rejected(self, socket_folder: Path) -> None:
        async with Service(socket_folder, max_body_bytes=1024).run() as service, service.socket_client() as client:

            async def parts() -> AsyncIterator[bytes]:
                for _ in range(100):
                    yield b" " * 1000

            headers = {"content-type": "application/json"}
            for content in (b" " * 2000, parts()):
                answer = await client.post(CHAT_PATH, content=content, headers=headers)
                assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")

    async def test_client_that_sends_all_of_an_oversized_body_can_read_the_error(self, socket_folder: Path) -> None:
        """OpenAI's client reads nothing before it has sent the whole body."""
        async with Service(socket_folder, max_body_bytes=1024).run() as service, service.socket_client() as client:
            answer = await client.post(CHAT_PATH, content=b" " * 2**22, headers={"content-type": "application/json"})
            assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")

    @pytest.mark.slow
    async def test_request_rejected_for_overload_gets_a_specific_error_code_and_a_retry_after_header(
        self, socket_folder: Path
    ) -> None:
        service = Service(socket_folder, max_running=1, max_queued=1, queue_timeout_s=0.2)
        async with service.run(), service.client() as client:
            async with admitted(service.admission):
                answer = await client.post(CHAT_PATH, json=CHAT)
            assert (answer.status_code, error_of(answer)["code"]) == (429, "overloaded")
            async with closed(service.admission):
                queued = asyncio.create_task(client.post(CHAT_PATH, json=CHAT))
                await until(lambda: service.admission.queued == 1)
                over = await client.post(CHAT_PATH, json=CHAT)
                late = await queued
            assert (over.status_code, error_of(over)["code"]) == (503, "queue_overflow")
            assert (late.status_code, error_of(late)["code"]) == (503, "queue_timeout")
            assert all("retry-after" in each.headers for each in (answer, over, late))
            assert (service.failed_anywhere("queue_overflow"), service.failed_anywhere("queue_timeout")) == (1, 1)

    async def test_request_is_rejected_if_there_is_no_engine(self, service: Service, client: httpx.AsyncClient) -> None:
        service.admission.unavailable("the engine is starting")
        answer = await client.post(CHAT_PATH, json=CHAT)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_unavailable")
        assert "retry-after" in answer.headers


class TestEngineErrors:
    async def test_overlong_prompt_returns_context_length_exceeded(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        service.double.max_model_len = 2
        answer = await client.post(CHAT_PATH, json=CHAT)
        assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")
        assert "parameter=" not in error_of(answer)["message"]

    async def test_error_names_the_field_the_engine_rejected(self, service: Service, client: httpx.AsyncClient) -> None:
        service.double.refuse_with = 400, {"message": "top_p must be in (0, 1]", "param": "top_p", "code": 400}
        answer = await client.post(CHAT_PATH, json=CHAT)
        assert error_of(answer) == {
            "message": "top_p must be in (0, 1]",
            "type": "invalid_request_error",
            "param": "top_p",
            "code": "invalid_request",
        }

    async def test_engine_404_is_returned_as_502(self, service: Service, client: httpx.AsyncClient) -> None:
        service.double.name = "something else"
        answer = await client.post(CHAT_PATH, json=CHAT)
        assert (answer.status_code, error_of(answer)["code"]) == (502, "engine_error")
        assert "does not exist" not in answer.text

    async def test_engine_500_is_returned_as_502_without_details(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        service.double.refuse_with = 500, {"message": "KeyError in /opt/vllm/x.py", "code": 500}
        answer = await client.post(CHAT_PATH, json=CHAT)
        assert (answer.status_code, error_of(answer)["code"]) == (502, "engine_error")
        assert "vllm" not in answer.text


class TestEngineDeaths:
    @pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
    async def test_request_fails_with_engine_died_if_the_engine_dies_before_answering(
        self, service: Service, client: httpx.AsyncClient, body: dict[str, Any]
    ) -> None:
        service.double.fault = Fault.DIE_BEFORE_ANSWER
        for _ in range(2):  # at the second request there is no engine
            answer = await client.post(CHAT_PATH, json=body)
            assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_died")
            assert "retry-after" in answer.headers
        assert service.admission.running == 0

    async def test_stream_that_fails_before_the_first_token_returns_an_http_error_status(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        service.double.fault = Fault.DEATH_AT_ONCE_IN_STREAM
        answer = await client.post(CHAT_PATH, json=STREAM)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_died")

    @pytest.mark.parametrize(
        ("fault", "code"),
        [
            (Fault.DIE_IN_STREAM, "engine_died"),
            (Fault.END_WITHOUT_DONE, "engine_died"),
            (Fault.ERROR_IN_STREAM, "engine_error"),
        ],
    )
    async def test_stream_ends_with_an_error_event_if_the_engine_fails_midway(
        self, service: Service, client: httpx.AsyncClient, fault: Fault, code: str
    ) -> None:
        service.double.fault = fault
        answer = await client.post(CHAT_PATH, json=STREAM)
        chunks = chunks_of(answer.text)
        assert answer.status_code == 200
        assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1]] == ["", "1.0 ", "1.1 "]
        assert chunks[-1]["error"]["code"] == code
        assert "secret" not in answer.text
        assert service.failed_anywhere(code) == 1
        assert service.admission.running == 0

    async def test_events_in_the_same_chunk_before_an_error_are_forwarded(
        self, service: Service, socket_folder: Path
    ) -> None:
        token = b'data: {"choices":[{"index":0,"delta":{"content":"one"}}]}\n\n'
        error = b'data: {"error":{"message":"no room","code":500}}\n\n'
        socket = socket_folder / "raw.sock"
        async with (
            raw_server(socket, say(STREAMED + chunk(token + error) + LAST_CHUNK)),
            connections(socket, silence_s=5) as service.http,
            service.client() as client,
        ):
            answer = await client.post(CHAT_PATH, json=STREAM)
        token_event, failure = chunks_of(answer.text)
        assert token_event["choices"][0]["delta"]["content"] == "one"
        assert failure["error"]["code"] == "engine_error"

    async def test_failed_stream_is_counted_as_an_error_of_the_version_that_served_it(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        service.double.fault = Fault.ERROR_IN_STREAM
        await client.post(CHAT_PATH, json=STREAM)
        assert service.failed("engine_error") == 1

    async def test_refused_request_is_counted_with_an_empty_version_label(self, socket_folder: Path) -> None:
        service = Service(socket_folder, max_running=1)
        async with service.run(), service.client() as client, admitted(service.admission):
            await client.post(CHAT_PATH, json=CHAT)
        assert service.failed("overloaded", NAME, "") == 1
        labels = {"model": NAME, "version": "", "route": CHAT_PATH, "status": "429", "outcome": "refused"}
        assert service.count("svc_requests_total", **labels) == 1

    async def test_new_engine_on_the_same_socket_is_used_immediately(self, service: Service) -> None:
        async with service.client() as client:
            for _ in range(3):
                assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200
            assert service.engine
            service.engine.kill()
            assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 503
            async with running_engine(service.double, service.engine.socket):
                assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200

    @pytest.mark.parametrize("stream", [False, True])
    async def test_request_times_out_if_the_engine_is_silent(self, socket_folder: Path, stream: bool) -> None:
        async with Service(socket_folder, request_timeout_s=0.1).run() as service, service.client() as client:
            service.double.fault = Fault.SILENCE
            answer = await client.post(CHAT_PATH, json={**CHAT, "stream": stream})
            if stream:
                assert chunks_of(answer.text)[-1]["error"]["code"] == "engine_timeout"
            else:
                assert (answer.status_code, error_of(answer)["code"]) == (504, "engine_timeout")
            await until(lambda: service.double.cancelled == 1)


class TestClientsThatLeave:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_engine_work_is_cancelled_when_the_client_disconnects(
        self, service: Service, live: httpx.AsyncClient, stream: bool
    ) -> None:
        service.double.token_delay_s = 0.02
        service.double.tokens = 1000
        task = asyncio.create_task(live.post(CHAT_PATH, json={**CHAT, "stream": stream}))
        await until(lambda: service.double.running == 1)
        task.cancel()
        await until(lambda: service.double.cancelled == 1 and service.admission.running == 0)
        await until(lambda: service.failed_anywhere("client_gone") == 1)

    async def test_request_succeeds_if_client_disconnects_after_the_last_event(
        self, service: Service, live: httpx.AsyncClient
    ) -> None:
        service.double.linger_s = 0.2
        async with live.stream("POST", CHAT_PATH, json=STREAM) as answer:
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    break  # as OpenAI's client does
        await until(lambda: service.admission.running == 0)
        assert service.failed_anywhere("client_gone") == 0

    async def test_queued_request_is_removed_when_its_client_disconnects(
        self, service: Service, live: httpx.AsyncClient
    ) -> None:
        async with closed(service.admission):
            task = asyncio.create_task(live.post(CHAT_PATH, json=CHAT))
            await until(lambda: service.admission.queued == 1)
            task.cancel()
            await until(lambda: service.admission.queued == 0)
        assert service.double.requests == []
        labels = {"model": NAME, "version": "", "route": CHAT_PATH, "status": "499", "outcome": "client_gone"}
        await until(lambda: service.count("svc_requests_total", **labels) == 1)

    @pytest.mark.slow
    async def test_slot_is_released_even_if_the_client_does_not_read(self, socket_folder: Path) -> None:
        async with Service(socket_folder).run() as service, service.socket_client() as client:
            service.double.tokens = MANY
            async with client.stream("POST", CHAT_PATH, json=STREAM) as answer:
                await until(lambda: service.double.running == 1)
                await until(lambda: service.admission.running == 0)
                assert "data: [DONE]" in [line async for line in answer.aiter_lines()]

    @pytest.mark.slow
    async def test_client_that_does_not_read_is_disconnected(self, socket_folder: Path) -> None:
        slow = Service(socket_folder, buffers=small_buffers(client_timeout_s=0.3))
        async with slow.run() as service, service.socket_client() as client:
            service.double.tokens = MANY
            async with client.stream("POST", CHAT_PATH, json=STREAM):
                await until(lambda: service.failed_anywhere("client_slow") == 1)
                await until(lambda: service.admission.running == 0)
                assert service.gateway_buffers.used == 0

    @pytest.mark.slow
    async def test_slow_but_steady_reader_gets_the_whole_answer(self, socket_folder: Path) -> None:
        slow = Service(socket_folder, buffers=small_buffers(client_timeout_s=0.5))
        async with slow.run() as service, service.socket_client() as client:
            service.double.tokens = MANY
            async with client.stream("POST", CHAT_PATH, json=STREAM) as answer:
                read = b""
                async for part in answer.aiter_raw(64 * 1024):
                    read += part
                    await asyncio.sleep(0.005)
            assert read.endswith(b"data: [DONE]\n\n")
            assert service.failed_anywhere("client_slow") == 0

    @pytest.mark.slow
    async def test_client_that_does_not_read_does_not_block_other_clients(self, socket_folder: Path) -> None:
        slow = Service(socket_folder, buffers=small_buffers(max_bytes=256 * 1024))
        async with slow.run() as service, service.socket_client() as client, AsyncExitStack() as stack:
            service.principals |= {"one": principal("k1"), "other": principal("k2")}
            one, other = {"x-api-key": "one"}, {"x-api-key": "other"}
            service.double.tokens = MANY
            for _ in range(12):
                await stack.enter_async_context(client.stream("POST", CHAT_PATH, json=STREAM, headers=one))
            await until(lambda: service.gateway_buffers.used > 96 * 1024)
            await asyncio.sleep(0.3)
            assert service.gateway_buffers.used <= 128 * 1024
            service.double.tokens = 7_000
            refused = await client.post(CHAT_PATH, json=CHAT, headers=one)
            assert (refused.status_code, error_of(refused)["code"]) == (429, "overloaded")
            assert (await client.post(CHAT_PATH, json=CHAT, headers=other)).status_code == 200


class TestLargeAnswers:
    @pytest.mark.slow
    async def test_non_streamed_answer_over_the_size_limit_is_rejected(self, socket_folder: Path) -> None:
        async with Service(socket_folder, buffers=small_buffers()).run() as service, service.client() as client:
            service.double.tokens = 20_000
            answer = await client.post(CHAT_PATH, json=CHAT)
            assert (answer.status_code, error_of(answer)["code"]) == (400, "answer_too_large")
            assert service.gateway_buffers.used == 0

    @pytest.mark.slow
    async def test_streamed_answer_over_the_size_limit_is_delivered(self, socket_folder: Path) -> None:
        async with Service(socket_folder, buffers=small_buffers()).run() as service, service.client() as client:
            service.double.tokens = MANY
            assert chunks_of((await client.post(CHAT_PATH, json=STREAM)).text)[-1] == "[DONE]"

    @pytest.mark.slow
    async def test_request_returns_429_if_the_shared_answer_buffers_fill_up(self, socket_folder: Path) -> None:
        async with (
            Service(socket_folder, buffers=AnswerBuffers(max_bytes=64 * 1024)).run() as service,
            service.client() as client,
        ):
            service.double.tokens = 20_000
            answer = await client.post(CHAT_PATH, json=CHAT)
            assert (answer.status_code, error_of(answer)["code"]) == (429, "overloaded")

    @pytest.mark.parametrize("asked", [{"n": 1024}, {"n": 2, "max_tokens": 2_000}], ids=["no limit", "a limit"])
    async def test_request_exceeding_the_total_token_capacity_is_rejected(
        self, socket_folder: Path, asked: dict[str, int]
    ) -> None:
        async with Service(socket_folder, max_running=1).run() as service, service.client() as client:
            answer = await client.post(CHAT_PATH, json={**CHAT, **asked})
            assert (answer.status_code, error_of(answer)["code"]) == (400, "too_many_tokens")
            assert service.double.requests == []


class TestOutcomes:
    """Tests how answers end. Status 200 only means that an answer began; the outcome shows how it ended."""

    async def test_failed_stream_has_outcome_engine_error(self, service: Service, client: httpx.AsyncClient) -> None:
        service.double.fault = Fault.ERROR_IN_STREAM
        await client.post(CHAT_PATH, json=STREAM)
        assert ended(service, "200", "engine_error") == 1

    async def test_duration_of_a_failed_stream_is_not_measured(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        service.double.fault = Fault.ERROR_IN_STREAM
        await client.post(CHAT_PATH, json=STREAM)
        labels = {"model": NAME, "version": "1", "route": CHAT_PATH}
        assert service.count("svc_request_duration_seconds_count", **labels) == 0

    async def test_stream_abandoned_by_its_client_has_outcome_client_gone(
        self, service: Service, live: httpx.AsyncClient
    ) -> None:
        service.double.tokens, service.double.token_delay_s = 1000, 0.01
        async with live.stream("POST", CHAT_PATH, json=STREAM) as answer:
            await anext(answer.aiter_lines())
        await until(lambda: ended(service, "200", "client_gone") == 1)


class TestLoad:
    @pytest.mark.slow
    async def test_version_change_under_load_neither_loses_nor_mixes_up_answers(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        service.double.token_delay_s = 0.001

        async def ask(number: int) -> tuple[str, str]:
            await asyncio.sleep(number * 0.002)
            answer = await client.post(CHAT_PATH, json={**CHAT, "stream": number % 2 == 0})
            assert answer.status_code == 200
            return answer.headers["x-model-version"], answer.text

        asking = [asyncio.create_task(ask(number)) for number in range(60)]
        await asyncio.sleep(0.04)
        async with closed(service.admission):
            await until(lambda: not service.admission.running)
            await asyncio.sleep(0.02)
            service.double.weights = service.double.cached_weights = "/models/tuned/2"
            service.load(TWO)
        answers = await asyncio.gather(*asking)
        for version, text in answers:
            number = version.removeprefix(f"{NAME}@")
            assert f"{number}.0 " in text
            assert f"{3 - int(number)}." not in text
        assert {version for version, _ in answers} == {f"{NAME}@1", f"{NAME}@2"}
