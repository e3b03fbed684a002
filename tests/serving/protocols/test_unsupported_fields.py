"""Tests that only fields with which a client can harm others are rejected, under all their names."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.protocols.route import Route
from serving.protocols.unsupported_fields import MAX_ANSWERS, find_refusal

CHAT, PLAIN, RESPONSES, MESSAGES = (Route.CHAT_COMPLETIONS, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES)
every_route = pytest.mark.parametrize("route", list(Route))


def refused(fields: dict[str, Any], route: Route) -> str | None:
    """Return the invalid field, or None if the request is accepted."""
    refusal = find_refusal(fields, route)
    return refusal.param if refusal else None


@every_route
def test_prompt_log_probabilities_are_rejected(route: Route) -> None:
    values = [0, 1, -1, False, "1", []]
    assert [value for value in values if refused({"prompt_logprobs": value}, route) != "prompt_logprobs"] == []


def test_alternative_field_names_for_prompt_log_probabilities_are_rejected() -> None:
    cases: list[tuple[Route, dict[str, Any]]] = [
        (PLAIN, {"echo": True, "logprobs": 0}),
        (PLAIN, {"echo": 1, "logprobs": 5}),
        (PLAIN, {"echo": "true", "logprobs": 1}),
        (PLAIN, {"echo": True, "logprobs": 1, "logprob_token_ids": [1]}),
        (CHAT, {"echo": True}),
        (CHAT, {"echo": True, "logprobs": True, "top_logprobs": 2}),
    ]
    for route, fields in cases:
        assert refused(fields, route) == "echo", route


@every_route
@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
def test_kv_transfer_parameters_are_rejected(route: Route, name: str) -> None:
    for value in ({"do_remote_decode": True}, {}, "x"):
        assert refused({name: value}, route) == name
        assert refused({"vllm_xargs": {name: value}}, route) == f"vllm_xargs.{name}"


def test_fields_for_stored_or_background_responses_are_rejected() -> None:
    cases: list[tuple[str, list[object]]] = [
        ("background", [True, 1, "true"]),
        ("store", [True, 1, "true"]),
        ("previous_response_id", ["resp_1", ""]),
        ("conversation", ["conv_1", {"id": "conv_1"}]),
    ]
    for param, values in cases:
        assert [refused({param: value}, RESPONSES) for value in values] == [param] * len(values), param


@pytest.mark.parametrize("route", [CHAT, PLAIN])
@given(n=st.integers(1, 2000), prompts=st.integers(1, 2000))
def test_too_many_choices_are_rejected(route: Route, n: int, prompts: int) -> None:
    for prompt in ("a", [1, 2]):
        fields = {"n": n, "prompt": [prompt] * prompts}
        assert refused(fields, route) == ("n" if n * prompts > MAX_ANSWERS else None)


def test_non_integer_n_is_rejected() -> None:
    cases: list[object] = ["2000", 2000.0, True, [1]]
    for n in cases:
        assert refused({"n": n}, CHAT) == "n", n


@pytest.mark.parametrize("route", [CHAT, PLAIN, RESPONSES])
def test_priority_field_is_rejected(route: Route) -> None:
    values = [1, -1, 2**63, "5", 0.5, True]
    assert [value for value in values if refused({"priority": value}, route) != "priority"] == []


URL = "http://169.254.169.254/latest/meta-data"
TEXT = {"type": "text", "text": "What is this?"}


MEDIA: tuple[dict[str, Any], ...] = (
    {"type": "image_url", "image_url": {"url": URL}},
    {"image_url": URL},
    {"type": None, "image_url": URL},
    {"type": "text", "text": "x", "uuid": "1", "image_url": {"url": URL}},
    {"type": "input_image", "image_url": URL},
    {"type": "audio_url", "audio_url": {"url": URL}},
    {"type": "video_url", "video_url": {"url": URL}},
    {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    {"type": "image_embeds", "image_embeds": ""},
    {"type": "file", "file": {"file_id": "1"}},
    {"type": "of tomorrow"},
    {"type": ["text"]},
)


def test_media_part_that_the_engine_would_fetch_is_rejected() -> None:
    for part in MEDIA:
        assert refused({"messages": [{"role": "user", "content": [TEXT, part]}]}, CHAT) == "messages.0.content", part
        assert refused({"input": [{"role": "user", "content": [part]}]}, RESPONSES) == "input.0.content", part
        output = {"type": "function_call_output", "call_id": "1", "output": [part]}
        assert refused({"input": ["hi", output]}, RESPONSES) == "input.1.output", part


def test_images_in_messages_are_rejected() -> None:
    image = {"type": "image", "source": {"type": "url", "url": URL}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [TEXT, image]}
    for part in (image, result, {"type": "document", "source": {"type": "url", "url": URL}}):
        turns = [{"role": "user", "content": "hi"}, {"role": "user", "content": [part]}]
        assert refused({"messages": turns}, MESSAGES) == "messages.1.content"
    assert refused({"system": [image], "messages": []}, MESSAGES) == "system"


@pytest.mark.parametrize("route", [CHAT, RESPONSES, MESSAGES])
def test_media_processing_options_are_rejected(route: Route) -> None:
    for name in ("mm_processor_kwargs", "media_io_kwargs"):
        assert refused({name: {}}, route) == name


TEXT_FORMS: tuple[tuple[Route, dict[str, Any]], ...] = (
    (CHAT, {"messages": [{"role": "user", "content": [TEXT, "plain", {"type": "refusal", "refusal": "no"}]}]}),
    (CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"image_url": "x"}]}]}),
    (CHAT, {"messages": "no list"}),
    (CHAT, {"messages": ["no turn", {"role": "user"}, {"role": "user", "content": {"type": "image_url"}}]}),
    (RESPONSES, {"input": "hi"}),
    (RESPONSES, {"input": [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}]}),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}),
    (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "1", "output": "image_url"}]}),
    (
        MESSAGES,
        {
            "system": [TEXT],
            "messages": [
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "input": {"type": "image", "a": [{}]}}],
                },
                {"role": "user", "content": [{"type": "tool_result", "content": [TEXT]}, {"type": "thinking"}]},
            ],
        },
    ),
)
OTHER_FIELDS: tuple[tuple[Route, dict[str, Any]], ...] = (
    (CHAT, {"prompt_logprobs": None, "echo": False, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"n": None}),
    (CHAT, {"n": MAX_ANSWERS}),
    (CHAT, {"kv_transfer_params": None, "vllm_xargs": {"own": 1}, "priority": 0, "cache_salt": "x"}),
    (CHAT, {"tools": [{"type": "function"}], "response_format": {"type": "json_object"}, "seed": 1}),
    (PLAIN, {"echo": True}),
    (PLAIN, {"echo": False, "logprobs": 1}),
    (PLAIN, {"prompt": [7] * 5000}),
    (PLAIN, {"prompt": []}),
    (RESPONSES, {"background": False, "store": False, "previous_response_id": None, "conversation": None}),
    (RESPONSES, {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "truncation": "auto"}),
    (MESSAGES, {"max_tokens": 5, "thinking": {"type": "disabled"}, "store": True}),
)


def test_text_content_is_accepted_in_every_supported_form() -> None:
    assert [fields for route, fields in TEXT_FORMS if find_refusal(fields, route)] == []


def test_fields_without_gateway_restrictions_are_validated_only_by_the_engine() -> None:
    assert [fields for route, fields in OTHER_FIELDS if find_refusal(fields, route)] == []
