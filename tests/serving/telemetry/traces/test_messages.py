"""Tests that prompts of every route are converted to the format of the OpenTelemetry conventions."""

import json
from typing import Any

from hypothesis import given

from serving.telemetry.traces.traces import input_messages, output_messages
from svc.dataset.schema.tool_calls import ToolCall, answer_text
from tests.svc.json_values import json_values


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "content": content}


CALL = {"type": "tool_call", "id": "c1", "name": "weather", "arguments": '{"in": "Oslo"}'}
RESULT = {"type": "tool_call_response", "id": "c1", "response": "rain"}
FUNCTION = {"name": "weather", "arguments": '{"in": "Oslo"}'}


def test_prompt_is_converted_to_messages() -> None:
    cases: list[tuple[Any, Any]] = [
        ("one", [{"role": "user", "parts": [text("one")]}]),
        (["one", "two"], [{"role": "user", "parts": [text("one")]}, {"role": "user", "parts": [text("two")]}]),
        ([{"role": "system", "content": "one"}], [{"role": "system", "parts": [text("one")]}]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}]}],
            [{"role": "user", "parts": [text("one"), text("two")]}],
        ),
        (
            [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "c1", "type": "function", "function": FUNCTION}],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            ],
            [{"role": "assistant", "parts": [CALL]}, {"role": "tool", "parts": [RESULT]}],
        ),
        (
            [
                {"type": "function_call", "call_id": "c1", **FUNCTION},
                {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            ],
            [{"role": "assistant", "parts": [CALL]}, {"role": "tool", "parts": [RESULT]}],
        ),
        (
            [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "rain"}]},
            ],
            [{"role": "assistant", "parts": [{**CALL, "arguments": {}}]}, {"role": "user", "parts": [RESULT]}],
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            [{"role": "user", "parts": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        ),
    ]
    assert [prompt for prompt, expected in cases if json.loads(input_messages(json.dumps(prompt))) != expected] == []


@given(json_values)
def test_any_client_prompt_is_converted_to_serializable_messages(prompt: Any) -> None:
    written = input_messages(json.dumps(prompt))
    assert written.encode("utf-8")
    for message in json.loads(written):
        assert isinstance(message["role"], str)
        assert all(isinstance(part["type"], str) for part in message["parts"])


def test_answer_is_converted_to_one_message() -> None:
    [message] = json.loads(output_messages("é", "stop"))
    assert message == {"role": "assistant", "parts": [text("é")], "finish_reason": "stop"}


def test_empty_answer_message_has_no_parts() -> None:
    [message] = json.loads(output_messages("", "tool_calls"))
    assert message == {"role": "assistant", "parts": [], "finish_reason": "tool_calls"}


def test_stored_tool_calls_are_separate_message_parts() -> None:
    [message] = json.loads(output_messages(answer_text("I look.", [ToolCall("rain", '{"a": 1}')]), "tool_calls"))
    assert message["parts"] == [
        {"type": "text", "content": "I look."},
        {"type": "tool_call", "id": None, "name": "rain", "arguments": {"a": 1}},
    ]


def test_finish_reason_of_an_interrupted_answer_is_error() -> None:
    assert json.loads(output_messages("on", None))[0]["finish_reason"] == "error"


def test_lone_surrogate_does_not_make_a_span_batch_unencodable() -> None:
    assert input_messages('"\\ud800"').encode("utf-8")
    assert output_messages("\udfff", "stop").encode("utf-8")
