"""Log-probabilities of sampled tokens: how a request asks for them, and how an answer is read."""

import json
from typing import Any

import pytest

from serving.protocols.route import Route
from serving.protocols.sampled_logprobs import mean_logprob, with_logprobs

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
PLAIN: dict[str, Any] = {"prompt": "a"}
ROUTES = {Route.CHAT_COMPLETIONS: CHAT, Route.COMPLETIONS: PLAIN}


def asking(route: Route, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the request that asks for log-probabilities."""
    result: dict[str, Any] = json.loads(with_logprobs(route, json.dumps(fields).encode()))
    return result


def chat_logprobs(*values: float) -> dict[str, Any]:
    return {"content": [{"token": "a", "logprob": value, "bytes": [97], "top_logprobs": []} for value in values]}


def plain_logprobs(*values: float | None) -> dict[str, Any]:
    alternatives = [None if value is None else {"a": value} for value in values]
    offsets = list(range(len(values)))
    return {
        "text_offset": offsets,
        "token_logprobs": list(values),
        "tokens": ["a"] * len(values),
        "top_logprobs": alternatives,
    }


def body(*logprobs: dict[str, Any] | None) -> bytes:
    choices = [{"index": index, "logprobs": each} for index, each in enumerate(logprobs)]
    return json.dumps({"choices": choices}).encode()


def event(logprobs: dict[str, Any] | None) -> bytes:
    return b"data: " + body(logprobs) + b"\n\n"


@pytest.mark.parametrize("unset", [{}, {"logprobs": None}])
def test_logprobs_of_sampled_tokens_are_requested_when_the_client_requests_none(unset: dict[str, Any]) -> None:
    assert asking(Route.CHAT_COMPLETIONS, CHAT | unset) == CHAT | {"logprobs": True}
    assert asking(Route.COMPLETIONS, PLAIN | unset) == PLAIN | {"logprobs": 0}


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (Route.CHAT_COMPLETIONS, {"logprobs": True, "top_logprobs": 5}),
        (Route.COMPLETIONS, {"logprobs": 3}),
        (Route.COMPLETIONS, {"logprobs": 0}),
    ],
)
def test_request_is_unchanged_when_it_already_requests_logprobs(route: Route, fields: dict[str, Any]) -> None:
    request = json.dumps(ROUTES[route] | fields).encode()
    assert with_logprobs(route, request) == request


@pytest.mark.parametrize("field", ["echo", "use_beam_search"])
def test_logprobs_are_not_added_to_a_request_with_beam_search_or_prompt_scoring(field: str) -> None:
    for route, fields in ROUTES.items():
        assert asking(route, fields | {field: True}) == fields | {field: True}


@pytest.mark.parametrize("route", [Route.RESPONSES, Route.MESSAGES])
def test_request_is_unchanged_when_its_route_does_not_support_logprobs(route: Route) -> None:
    assert with_logprobs(route, b'{"input":"a"}') == b'{"input":"a"}'


def test_lone_surrogate_in_a_request_is_unchanged_when_logprobs_are_added() -> None:
    request = b'{"messages":[{"role":"user","content":"\\ud800"}]}'
    assert b"\\ud800" in with_logprobs(Route.CHAT_COMPLETIONS, request)


def test_mean_logprob_covers_all_tokens_of_all_choices() -> None:
    assert mean_logprob([body(chat_logprobs(-1.0, -2.0), chat_logprobs(-6.0))]) == -3.0
    assert mean_logprob([body(plain_logprobs(-1.0, -3.0))]) == -2.0


def test_mean_logprob_covers_all_events_of_a_streamed_answer() -> None:
    events = [event(None), event(chat_logprobs(-1.0)), event(chat_logprobs(-2.0, -3.0)), b"data: [DONE]\n\n"]
    assert mean_logprob(events) == -2.0


def test_mean_logprob_skips_tokens_with_unknown_logprobs() -> None:
    assert mean_logprob([body(chat_logprobs(-1.0, -9999.0))]) == -1.0
    assert mean_logprob([body(plain_logprobs(None, -1.0))]) == -1.0


@pytest.mark.parametrize("part", [body(None), body(chat_logprobs()), b"{}", b"no JSON", b": note\n\n"])
def test_mean_logprob_is_unknown_when_the_answer_has_no_logprobs(part: bytes) -> None:
    assert mean_logprob([part]) is None


@pytest.mark.slow  # vLLM's import takes some ten seconds
def test_vllm_returns_sampled_token_logprobs_without_scoring_the_prompt() -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    chat = ChatCompletionRequest(**asking(Route.CHAT_COMPLETIONS, CHAT)).to_sampling_params(5, {})
    plain = CompletionRequest(**asking(Route.COMPLETIONS, PLAIN)).to_sampling_params(5, {})
    assert [(params.logprobs, params.prompt_logprobs) for params in (chat, plain)] == [(0, None)] * 2


@pytest.mark.slow  # vLLM's import takes some ten seconds
def test_logprobs_are_read_from_responses_in_vllm_format() -> None:
    pytest.importorskip("vllm")
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionLogProbs,
        ChatCompletionResponseChoice,
        ChatCompletionResponseStreamChoice,
    )
    from vllm.entrypoints.openai.completion.protocol import CompletionLogProbs, CompletionResponseChoice

    chat = ChatCompletionLogProbs.model_validate(chat_logprobs(-1.0, -2.0))
    message = {"role": "assistant", "content": "a"}
    whole = ChatCompletionResponseChoice(index=0, message=message, logprobs=chat)
    chunk = ChatCompletionResponseStreamChoice(index=0, delta={"content": "a"}, logprobs=chat)
    plain = CompletionResponseChoice(
        index=0, text="a", logprobs=CompletionLogProbs.model_validate(plain_logprobs(None, -1.5))
    )
    for choice in (whole, chunk, plain):
        assert mean_logprob([b'{"choices":[' + choice.model_dump_json().encode() + b"]}"]) == -1.5
