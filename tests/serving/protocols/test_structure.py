"""Tests that requests with more structure than vLLM's API server can check quickly are rejected."""

import json
from typing import Any

import pytest

from serving.protocols.json_values import count_values, is_deeper
from serving.protocols.route import Route
from serving.protocols.structure import find_excess
from serving.protocols.usual_forms import is_usual_item, is_usual_message, is_usual_tool
from svc.settings.serve import RequestLimits

CHAT, PLAIN, RESPONSES, MESSAGES = Route.CHAT_COMPLETIONS, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES
USER = {"role": "user", "content": "a"}
LIMITS = RequestLimits()


def refused(fields: dict[str, Any], route: Route, limits: RequestLimits = LIMITS) -> str | None:
    """Return the invalid field, or None if the request is accepted."""
    refusal = find_excess(fields, route, limits, json.dumps(fields, separators=(",", ":")).encode())
    return refusal.param if refusal else None


@pytest.mark.parametrize("route", [CHAT, MESSAGES])
def test_too_many_messages_are_rejected(route: Route) -> None:
    assert refused({"messages": [USER] * 4096}, route) is None
    assert refused({"messages": [USER] * 4097}, route) == "messages"
    assert refused({"messages": [USER] * 3}, route, RequestLimits(messages=2)) == "messages"


def test_too_many_input_items_are_rejected() -> None:
    assert refused({"input": [USER] * 2048}, RESPONSES) is None
    assert refused({"input": [USER] * 2049}, RESPONSES) == "input"


@pytest.mark.parametrize("key", ["content", "tool_calls"])
def test_too_many_parts_across_all_messages_are_rejected(key: str) -> None:
    limits = RequestLimits(content_parts=10)
    assert refused({"messages": [{**USER, key: [{}] * 5}] * 2}, MESSAGES, limits) is None
    assert refused({"messages": [{**USER, key: [{}] * 5}] * 3}, MESSAGES, limits) == "messages"


def test_too_many_tools_are_rejected() -> None:
    assert refused({"tools": [{}] * 513}, CHAT) == "tools"


def test_too_many_nonstandard_messages_are_rejected() -> None:
    cases: list[tuple[Any, int]] = [({"role": "z"}, 1024), ({}, 1024), (1, 1024), ({**USER, "name": 1}, 1024)]
    for message, most in cases:
        assert refused({"messages": [USER, *[message] * most]}, CHAT) is None, message
        assert refused({"messages": [USER, *[message] * (most + 1)]}, CHAT) == "messages.1", message


@pytest.mark.parametrize(("field", "most"), [("input", 32), ("tools", 64)])
def test_too_many_nonstandard_items_and_tools_are_rejected(field: str, most: int) -> None:
    assert refused({field: [{}] * most}, RESPONSES) is None
    assert refused({field: [{}] * (most + 1)}, RESPONSES) == f"{field}.0"


def test_input_item_of_an_unknown_type_is_rejected_if_it_contains_too_many_values() -> None:
    assert refused({"input": [{"type": "z", "content": [[1]] * 600}]}, RESPONSES) == "input.0"


def test_nonstandard_items_are_rejected_if_their_combined_value_count_exceeds_the_limit() -> None:
    item = {"type": "z", "content": [1] * 600}
    assert refused({"input": [item]}, RESPONSES) is None
    assert refused({"input": [item] * 2}, RESPONSES) == "input.0"


def test_prompts_of_every_valid_type_are_accepted() -> None:
    prompts: list[Any] = ["a", ["a", "b"], [1, 2], [[1, 2], [3]], list(range(100_000))]
    assert [prompt for prompt in prompts if refused({"prompt": prompt}, PLAIN)] == []


def test_prompts_with_mixed_types_are_rejected() -> None:
    prompts: list[Any] = [[1, "a"], ["a", 1], [1.0], [-1], [[1], ["a"]], [[1], 2], [[-1]], [True], [None], {"a": 1}]
    assert [prompt for prompt in [*prompts, [{}]] if refused({"prompt": prompt}, PLAIN) != "prompt"] == []


@pytest.mark.slow
def test_token_id_list_with_100000_entries_is_accepted() -> None:
    for field in ("allowed_token_ids", "stop_token_ids", "logprob_token_ids"):
        assert refused({field: list(range(100_000))}, CHAT) is None, field
        assert refused({field: [1, "a"]}, CHAT) == field, field


@pytest.mark.parametrize(
    ("route", "field"),
    [
        (CHAT, "logit_bias"),
        (CHAT, "documents"),
        (PLAIN, "vllm_xargs"),
        (RESPONSES, "metadata"),
        (MESSAGES, "some_field_of_a_later_release"),
    ],
)
def test_field_with_too_many_nested_values_is_rejected(field: str, route: Route) -> None:
    assert refused({field: {str(number): 1 for number in range(4096)}}, route) is None
    assert refused({field: {str(number): 1 for number in range(4097)}}, route) == field
    assert refused({field: [[[1] * 100] * 50]}, route) == field


def test_request_nested_too_deeply_is_rejected() -> None:
    value: Any = "a"
    for _ in range(63):
        value = {"a": value}
    assert refused({"metadata": value}, CHAT) is None
    assert refused({"metadata": [value]}, CHAT) == ""


def test_depth_and_value_count_match_a_simple_recursive_count() -> None:
    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    def count(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return sum(1 + count(each) for each in inner)

    values: list[Any] = [1, "a", [], {}, {"a": []}, [[1, {"a": [2]}], 3]]
    for value in values:
        assert count_values(value, 100) == count(value), value
        assert not is_deeper([value], depth(value) + 1), value
        assert is_deeper([value], depth(value)), value


ASSISTANT = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    "refusal": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
}
OUTPUT = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "a", "annotations": [], "logprobs": None}],
}


def test_messages_from_common_clients_have_a_standard_form() -> None:
    messages: list[Any] = [
        USER,
        {"role": "system", "content": [{"type": "text", "text": "a"}]},
        {"role": "developer", "content": "a", "name": "b"},
        {"role": "tool", "content": "a", "tool_call_id": "b"},
        {"role": "assistant", "content": "a", "reasoning_content": "b"},
        ASSISTANT,
    ]
    assert [message for message in messages if not is_usual_message(message)] == []


def test_input_items_from_common_clients_have_a_standard_form() -> None:
    items: list[Any] = [
        USER,
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        OUTPUT,
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", "id": "b", "status": "completed"},
        {"type": "function_call_output", "call_id": "a", "output": "b"},
        {"type": "reasoning", "id": "a", "summary": [], "content": [{"type": "reasoning_text", "text": "b"}]},
    ]
    assert [item for item in items if not is_usual_item(item)] == []


def test_malformed_or_unknown_input_items_have_no_standard_form() -> None:
    items: list[Any] = [1, None, {}, {"type": "z"}, {**USER, "role": "z"}, {**OUTPUT, "status": 1}]
    assert [item for item in items if is_usual_item(item)] == []


def test_only_function_tools_have_a_standard_form() -> None:
    function = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
    assert is_usual_tool(function)
    assert not is_usual_tool({"type": "file_search", "vector_store_ids": []})
