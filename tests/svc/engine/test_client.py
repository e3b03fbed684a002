"""Tests that the client sends the requests vLLM expects, and that invalid responses raise EngineError."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import fmean

import httpx
import pytest

from svc.dataset.schema.example import Message, Role
from svc.engine.client import EngineClient, Health
from svc.errors import EngineError
from tests.serving.engine_double import EngineDouble, logprob_of
from tests.svc.engine.in_process import client_of

PROMPT = [Message(Role.USER, "one two three")]
Ask = Callable[[EngineClient], Awaitable[object]]


def answering(respond: Callable[[httpx.Request], httpx.Response]) -> EngineClient:
    return EngineClient(httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://engine"), "tuned")


async def test_chat_uses_greedy_decoding_and_limits_the_number_of_tokens() -> None:
    double = EngineDouble()
    async with client_of(double) as client:
        assert (await client.chat(PROMPT, max_tokens=2)).text == "1.0 1.1 "
    assert double.requests[0]["temperature"] == 0
    assert double.requests[0]["messages"] == [{"role": "user", "content": "one two three"}]


async def test_answer_includes_length_and_finish_reason() -> None:
    async with client_of(EngineDouble(tokens=3, finish_reason="stop")) as client:
        ended = await client.chat(PROMPT, max_tokens=4)
    async with client_of(EngineDouble()) as client:
        cut_off = await client.chat(PROMPT, max_tokens=3)
    assert (ended.text, ended.tokens, ended.finish_reason) == ("1.0 1.1 1.2 ", 4, "stop")
    assert (cut_off.text, cut_off.tokens, cut_off.finish_reason) == ("1.0 1.1 1.2 ", 3, "length")


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
async def test_answer_logprob_equals_the_logprob_from_rescoring_the_answer(finish_reason: str) -> None:
    async with client_of(EngineDouble(finish_reason=finish_reason)) as client:
        answer = await client.chat(PROMPT, max_tokens=3)
        prompt, tokens = await client.prompt_tokens(PROMPT), await client.tokens(answer.text)
        assert answer.logprob == pytest.approx(fmean(await client.logprobs(prompt + tokens, len(prompt))))


@pytest.mark.parametrize("parses_calls", [True, False])
async def test_tool_calls_are_parsed_by_the_engine_only_if_requested(parses_calls: bool) -> None:
    bodies = []

    def respond(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        function = {"name": "rain", "arguments": '{"days": 2, "city": "Rome"}'}
        choice = {
            "message": {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
            "logprobs": {"content": [{"token": "a", "logprob": -1.0}, END]},
            "finish_reason": "tool_calls",
        }
        return httpx.Response(200, json={"choices": [choice], "usage": {"completion_tokens": 2}})

    http = httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://engine")
    tools = ['{"type": "function", "function": {"name": "rain"}}']
    async with EngineClient(http, "tuned") as client:
        answer = await client.chat(PROMPT, max_tokens=9, tools=tools, find_calls=parses_calls)
    assert bodies[0]["tool_choice"] == ("auto" if parses_calls else "none")
    assert answer.text == '{"name": "rain", "arguments": {"city": "Rome", "days": 2}}'
    assert answer.logprob == -1.0


END = {"token": "<|im_end|>", "logprob": -0.5}


@pytest.mark.parametrize(
    "logprobs", [{"content": [END]}, {"content": []}, {"content": None}, None], ids=["end", "none", "null", "absent"]
)
async def test_empty_answer_has_empty_text_and_no_logprob(logprobs: object) -> None:
    choice = {"message": {"content": None}, "logprobs": logprobs, "finish_reason": "stop"}
    body = {"choices": [choice], "usage": {"completion_tokens": 1}}
    async with answering(lambda request: httpx.Response(200, json=body)) as client:
        answer = await client.chat(PROMPT, max_tokens=2)
    assert (answer.text, answer.tokens, answer.logprob) == ("", 1, None)


async def test_logprobs_start_at_the_given_token_position() -> None:
    double = EngineDouble()
    async with client_of(double) as client:
        found = await client.logprobs([5, 6, 7, 8], 2)
    assert found == (logprob_of(double.weights, 7, 2), logprob_of(double.weights, 8, 3))


async def test_text_is_tokenized_without_special_tokens() -> None:
    bodies: list[bytes] = []

    def respond(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        return httpx.Response(200, json={"tokens": [1, 2]})

    async with answering(respond) as client:
        assert await client.tokens("one two") == [1, 2]
    assert b'"add_special_tokens":false' in bodies[0].replace(b" ", b"")


async def test_prompts_are_tokenized_with_the_engine_chat_template() -> None:
    async with client_of(EngineDouble()) as client:
        assert len(await client.prompt_tokens(PROMPT)) == 3


async def test_generate_ignores_end_of_sequence_until_the_token_limit() -> None:
    double = EngineDouble()
    async with client_of(double) as client:
        await client.generate([1, 2], tokens=3)
    assert (double.requests[0]["max_tokens"], double.requests[0]["ignore_eos"]) == (3, True)


async def test_request_ids_are_unique_and_carry_the_client_prefix() -> None:
    double = EngineDouble()
    async with client_of(double) as client:
        marked = client.with_ids("holdout-")
        for one in (client, marked, marked):
            await one.chat(PROMPT, max_tokens=1)
    unmarked, *ids = double.request_ids
    assert unmarked == ""
    assert len(set(ids)) == 2
    assert all(request_id.startswith("holdout-") for request_id in ids)


async def test_engine_client_error_does_not_quote_request_text() -> None:
    body = {"error": {"message": "Unsupported role: 'my SECRET'"}}
    async with answering(lambda request: httpx.Response(400, json=body)) as client:
        with pytest.raises(
            EngineError, match=r"responded to /v1/chat/completions with status 400: Unsupported role:…"
        ) as raised:
            await client.chat(PROMPT, max_tokens=1)
    assert "SECRET" not in str(raised.value)


async def test_reload_loads_weights_from_the_given_folder() -> None:
    double = EngineDouble()
    async with client_of(double) as client:
        await client.reload_weights(Path("/models/tuned/2"))
    assert double.weights == "/models/tuned/2"


@pytest.mark.parametrize(("gigabytes", "timeout_s"), [(0, 300), (1, 320), (140, 3100)])
async def test_reload_timeout_grows_with_weight_size(tmp_path: Path, gigabytes: int, timeout_s: float) -> None:
    for number in (1, 2):
        with (tmp_path / f"model-{number}.safetensors").open("wb") as file:
            file.truncate(gigabytes * 10**9 // 2)  # sparse: it takes no space
    timeouts = list[dict[str, float]]()

    def respond(request: httpx.Request) -> httpx.Response:
        timeouts.append(request.extensions["timeout"])
        return httpx.Response(200)

    async with answering(respond) as client:
        await client.reload_weights(tmp_path)
    assert (timeouts[0]["read"], timeouts[0]["connect"]) == (timeout_s, 5)


async def test_failed_reload_raises_engine_error() -> None:
    async with client_of(EngineDouble(loadable=lambda folder: False)) as client:
        with pytest.raises(EngineError, match="/collective_rpc with status 500"):
            await client.reload_weights(Path("/models/tuned/2"))


async def test_engine_can_sleep_and_wake() -> None:
    double = EngineDouble()
    async with client_of(double) as client:
        await client.sleep()
        assert double.asleep
        assert await client.healthy()
        await client.wake()
    assert not double.asleep


async def test_failed_sleep_or_wake_raises_engine_error() -> None:
    async with client_of(EngineDouble(sleepless=True, wakeless=True)) as client:
        with pytest.raises(EngineError, match=r"/sleep.* with status 500: CUDA error"):
            await client.sleep()
        with pytest.raises(EngineError, match="/wake_up with status 500: CUDA error"):
            await client.wake()


async def test_failed_cache_reset_is_retried() -> None:
    answers = iter([{"success": False}, {"success": False}, {"success": True}])
    async with answering(lambda request: httpx.Response(200, json=next(answers))) as client:
        await client.reset_prefix_cache()
    assert next(answers, None) is None


async def test_repeatedly_failing_cache_reset_raises_engine_error() -> None:
    async with answering(lambda request: httpx.Response(200, json={"success": False})) as client:
        with pytest.raises(EngineError, match="could not be reset"):
            await client.reset_prefix_cache(within_s=0.1)


async def test_responding_engine_is_healthy() -> None:
    async with client_of(EngineDouble()) as client:
        assert await client.healthy()


async def test_engine_with_a_dead_core_is_unhealthy() -> None:
    async with answering(lambda request: httpx.Response(503)) as client:
        assert not await client.healthy()


@pytest.mark.parametrize(
    ("status", "health"), [(200, Health.GOOD), (503, Health.DEAD), (500, Health.BAD), (599, Health.BAD)]
)
async def test_health_is_determined_by_response_status(status: int, health: Health) -> None:
    """vLLM responds with 503 when its core is dead."""
    async with answering(lambda request: httpx.Response(status)) as client:
        assert await client.health() is health


async def test_engine_is_reported_dead_when_its_socket_is_gone(tmp_path: Path) -> None:
    async with EngineClient.of(tmp_path / "engine.sock", "tuned") as client:
        assert await client.health() is Health.DEAD


async def test_engine_that_does_not_exist_is_unhealthy(tmp_path: Path) -> None:
    async with EngineClient.of(tmp_path / "none.sock", "tuned") as client:
        assert not await client.healthy()


async def test_request_to_an_engine_that_does_not_exist_raises_engine_error(tmp_path: Path) -> None:
    async with EngineClient.of(tmp_path / "none.sock", "tuned") as client:
        with pytest.raises(EngineError, match="the engine did not respond to /v1/chat/completions"):
            await client.chat(PROMPT, max_tokens=1)


async def test_error_for_a_rejected_request_contains_the_status_and_the_reason() -> None:
    double = EngineDouble(max_model_len=2)
    async with client_of(double) as client:
        with pytest.raises(EngineError, match=r"with status 400: .*maximum context length is 2"):
            await client.chat(PROMPT, max_tokens=1)


async def test_long_rejection_message_is_truncated() -> None:
    async with answering(lambda request: httpx.Response(500, text="x" * 10_000)) as client:
        with pytest.raises(EngineError) as caught:
            await client.chat(PROMPT, max_tokens=1)
    assert len(caught.value.wrong) < 700


async def ask_chat(client: EngineClient) -> object:
    return await client.chat(PROMPT, max_tokens=1)


async def ask_tokens(client: EngineClient) -> object:
    return await client.tokens("x")


async def ask_logprobs(client: EngineClient) -> object:
    return await client.logprobs([1, 2, 3], 1)


@pytest.mark.parametrize("ask", [ask_chat, ask_tokens, ask_logprobs])
async def test_invalid_engine_response_raises_engine_error(ask: Ask) -> None:
    bodies = [
        b"<html>no JSON</html>",
        b"",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop", "logprobs": {"content": [{}]}}]}',
        b'{"choices": [{"prompt_logprobs": null, "message": null}], "tokens": null}',
        b'{"choices": [{"prompt_logprobs": [null, {"2": {}}]}], "tokens": ["x"]}',
        b'{"choices": [{"prompt_logprobs": [null, {"9": {"logprob": -1}}, {"3": {"logprob": -1}}]}], "tokens": 5}',
    ]
    answers = iter(bodies)
    async with answering(lambda request: httpx.Response(200, content=next(answers))) as client:
        for body in bodies:
            with pytest.raises(EngineError, match="cannot parse"):
                pytest.fail(f"{body!r} was read as {await ask(client)}")


async def test_request_succeeds_even_if_the_engine_closes_the_reused_connection(tmp_path: Path) -> None:
    """The engine closes an idle connection while the next request is being sent."""
    body = b'{"tokens": [1]}'

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body), b""):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            writer.write(answer)
            await writer.drain()
        writer.close()

    socket = tmp_path / "engine.sock"
    server = await asyncio.start_unix_server(answer_once, socket)
    async with EngineClient.of(socket, "tuned") as client:
        assert [await client.tokens("text") for _ in range(3)] == [[1]] * 3
    server.close()


async def test_connection_lost_during_an_engine_request_raises_engine_error() -> None:
    def cut(request: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("Server disconnected without sending a response.")

    async with answering(cut) as client:
        with pytest.raises(EngineError, match="Server disconnected"):
            await client.logprobs([1, 2], 1)


async def test_adapters_are_loaded_and_removed_by_name() -> None:
    double = EngineDouble()
    async with client_of(double) as client:
        await client.load_adapter("tuned@2#a", Path("/models/tuned/2/adapter"))
        assert await client.adapters() == ["tuned@2#a"]
        assert (await client.named("tuned@2#a").chat(PROMPT, max_tokens=1)).text.endswith(".0 ")
        await client.unload_adapter("tuned@2#a")
        await client.unload_adapter("tuned@2#a")  # it need not be there
        assert await client.adapters() == []


async def test_logprobs_of_an_adapter_are_computed_with_its_own_weights() -> None:
    double = EngineDouble()
    async with client_of(double) as client:
        await client.load_adapter("a", Path("/models/tuned/2/adapter"))
        assert await client.named("a").logprobs((5, 6), 1) == (logprob_of("/models/tuned/2/merged", 6, 1),)
        assert await client.logprobs((5, 6), 1) == (logprob_of(double.weights, 6, 1),)


async def test_adapter_rejected_by_the_engine_raises_error() -> None:
    async with client_of(EngineDouble(broken_adapters={"2/adapter"})) as client:
        with pytest.raises(EngineError, match="load_lora_adapter with status 500"):
            await client.load_adapter("a", Path("/models/tuned/2/adapter"))
