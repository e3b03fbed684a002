"""Tests the service with the unmodified official client."""

import asyncio
from collections.abc import AsyncIterator

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionUserMessageParam
from pydantic import BaseModel

from serving.models.router import Router
from tests.serving.admission.opened import admitted
from tests.serving.control import until
from tests.serving.engine_double import Fault
from tests.serving.service import NAME, Service, closed

MESSAGES: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "one two three"}]
WEATHER: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture
async def official(service: Service) -> AsyncIterator[AsyncOpenAI]:
    """Yield the official client, without retries and using its own HTTP library."""
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(service.app))
    async with AsyncOpenAI(api_key="none", base_url="http://localhost/v1", http_client=http, max_retries=0) as official:
        yield official


async def test_openai_client_gets_a_chat_answer(official: AsyncOpenAI) -> None:
    answer = await official.chat.completions.create(model=NAME, messages=MESSAGES)
    assert answer.choices[0].message.content == "1.0 1.1 1.2 1.3 "
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


async def test_openai_client_gets_a_streamed_chat_answer(official: AsyncOpenAI) -> None:
    stream = await official.chat.completions.create(model=f"{NAME}@production", messages=MESSAGES, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "1.0 1.1 1.2 1.3 "


async def test_streamed_chat_includes_token_counts_if_requested(official: AsyncOpenAI) -> None:
    stream = await official.chat.completions.create(
        model=NAME, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 7


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_client_gets_a_completion(official: AsyncOpenAI, stream: bool) -> None:
    answer = await official.completions.create(model=f"{NAME}@1", prompt="one", stream=stream)
    if isinstance(answer, openai.AsyncStream):
        assert "".join([chunk.choices[0].text async for chunk in answer]) == "1.0 1.1 1.2 1.3 "
    else:
        assert answer.choices[0].text == "1.0 1.1 1.2 1.3 "


async def test_openai_client_can_read_version_and_request_id(official: AsyncOpenAI) -> None:
    raw = await official.chat.completions.with_raw_response.create(model=NAME, messages=MESSAGES)
    assert raw.headers["x-model-version"] == f"{NAME}@1"
    assert (raw.request_id or "").startswith("req-")


async def test_openai_client_lists_models(official: AsyncOpenAI) -> None:
    assert [model.id async for model in official.models.list()] == [NAME, f"{NAME}@1", f"{NAME}@production"]
    assert (await official.models.retrieve(f"{NAME}@1")).owned_by == "tuneserve"
    with pytest.raises(openai.NotFoundError):
        await official.models.retrieve("group/other")


async def test_openai_client_cannot_delete_a_served_model(official: AsyncOpenAI) -> None:
    for name in (NAME, f"{NAME}@1", f"{NAME}@production"):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await official.models.delete(name)
        assert (caught.value.code, caught.value.type) == ("model_not_deletable", "invalid_request_error"), name


async def test_deleting_an_unserved_model_raises_not_found(official: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await official.models.delete("group/other")


async def test_openai_client_does_not_retry_a_gateway_failure(
    service: Service, official: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[str]()

    def broken(self: Router, model: str, who: str = "") -> None:
        tried.append(model)
        raise ZeroDivisionError

    monkeypatch.setattr(Router, "find", broken)
    with pytest.raises(openai.InternalServerError):
        await official.with_options(max_retries=2).models.retrieve(NAME)
    assert tried == [NAME]


@pytest.mark.slow
async def test_openai_client_gets_a_response(official: AsyncOpenAI) -> None:
    answer = await official.responses.create(model=f"{NAME}@production", input="one two three", max_output_tokens=3)
    assert answer.output_text == "1.0 1.1 1.2 "
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (3, 3)


@pytest.mark.slow
async def test_openai_client_gets_a_streamed_response(official: AsyncOpenAI) -> None:
    stream = await official.responses.create(model=NAME, input="one two three", stream=True)
    events = [event async for event in stream]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "1.0 1.1 1.2 1.3 "
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert events[-1].response.usage is not None


async def test_storing_a_response_is_rejected_and_stored_responses_are_not_found(official: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await official.responses.create(model=NAME, input="one", store=True)
    assert caught.value.param == "store"
    with pytest.raises(openai.NotFoundError):
        await official.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError):
        await official.responses.cancel("resp_1")


@pytest.mark.parametrize("fault", [Fault.DIE_IN_STREAM, Fault.END_WITHOUT_DONE])
async def test_openai_client_raises_if_a_streamed_response_fails(
    service: Service, official: AsyncOpenAI, fault: Fault
) -> None:
    service.double.fault = fault
    stream = await official.responses.create(model=NAME, input="one two three", stream=True)
    with pytest.raises(openai.APIError, match="engine"):
        async for _ in stream:
            pass


async def test_openai_client_parses_a_tool_call(service: Service, official: AsyncOpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    service.double.message, service.double.finish_reason = {"content": None, "tool_calls": [call]}, "tool_calls"
    answer = await official.chat.completions.create(
        model=NAME, messages=MESSAGES, tools=[WEATHER], tool_choice="required"
    )
    called = answer.choices[0].message.tool_calls
    assert called
    assert called[0].type == "function"
    assert called[0].function.arguments == '{"city": "Bonn"}'
    assert service.double.requests[0]["tools"] == [WEATHER]
    assert service.double.requests[0]["tool_choice"] == "required"


async def test_answer_follows_the_requested_json_schema(service: Service, official: AsyncOpenAI) -> None:
    class Ticket(BaseModel):
        urgent: bool

    service.double.message = {"content": '{"urgent": true}'}
    service.double.finish_reason = "stop"
    answer = await official.chat.completions.parse(model=NAME, messages=MESSAGES, response_format=Ticket)
    assert answer.choices[0].message.parsed == Ticket(urgent=True)
    assert service.double.requests[0]["response_format"]["json_schema"]["schema"]["required"] == ["urgent"]


async def test_all_n_requested_choices_are_returned(official: AsyncOpenAI) -> None:
    answer = await official.chat.completions.create(model=NAME, messages=MESSAGES, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


async def test_log_probabilities_of_the_answer_are_returned(official: AsyncOpenAI) -> None:
    answer = await official.chat.completions.create(model=NAME, messages=MESSAGES, logprobs=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [token.token for token in logprobs.content or []] == ["1.0 ", "1.1 ", "1.2 ", "1.3 "]


async def test_openai_client_raises_not_found_for_an_unknown_model(official: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await official.chat.completions.create(model="other", messages=MESSAGES)
    assert (caught.value.code, caught.value.type) == ("model_not_found", "invalid_request_error")


async def test_openai_client_raises_bad_request_for_prompt_log_probabilities(official: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await official.completions.create(model=NAME, prompt="a", extra_body={"prompt_logprobs": 1})
    assert caught.value.param == "prompt_logprobs"


async def test_openai_client_raises_bad_request_for_an_overlong_prompt(service: Service, official: AsyncOpenAI) -> None:
    service.double.max_model_len = 1
    with pytest.raises(openai.BadRequestError) as caught:
        await official.chat.completions.create(model=NAME, messages=MESSAGES)
    assert caught.value.code == "context_length_exceeded"


async def test_openai_client_raises_server_error_if_there_is_no_engine(service: Service, official: AsyncOpenAI) -> None:
    service.admission.unavailable("the engine is starting")
    with pytest.raises(openai.InternalServerError) as caught:
        await official.chat.completions.create(model=NAME, messages=MESSAGES)
    assert (caught.value.status_code, caught.value.code) == (503, "engine_unavailable")
    assert caught.value.request_id


async def test_openai_client_raises_rate_limit_error_if_too_many_requests_run(
    official: AsyncOpenAI, service: Service
) -> None:
    service.admission.max_running = 0
    with pytest.raises(openai.RateLimitError) as caught:
        await official.chat.completions.create(model=NAME, messages=MESSAGES)
    assert caught.value.code == "overloaded"


@pytest.mark.parametrize("fault", [Fault.DIE_IN_STREAM, Fault.ERROR_IN_STREAM, Fault.END_WITHOUT_DONE])
async def test_openai_client_raises_if_a_stream_fails(service: Service, official: AsyncOpenAI, fault: Fault) -> None:
    service.double.fault = fault
    stream = await official.chat.completions.create(model=NAME, messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="engine"):
        async for _ in stream:
            pass


async def test_small_request_is_answered_if_the_large_request_ahead_of_it_in_the_queue_is_abandoned(
    service: Service, official: AsyncOpenAI
) -> None:
    service.admission.max_tokens = 100
    async with admitted(service.admission, 50):
        async with closed(service.admission):
            large = asyncio.create_task(
                official.chat.completions.create(model=NAME, messages=MESSAGES, max_completion_tokens=60)
            )
            await until(lambda: service.admission.queued == 1)
            small = asyncio.create_task(
                official.chat.completions.create(model=NAME, messages=MESSAGES, max_completion_tokens=8)
            )
            await until(lambda: service.admission.queued == 2)
        large.cancel()
        answer = await asyncio.wait_for(small, 5)
    assert answer.choices[0].message.content == "1.0 1.1 1.2 1.3 "
