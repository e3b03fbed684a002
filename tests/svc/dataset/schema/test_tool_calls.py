"""Tests that tools have the form of OpenAI's API, with an answer to every call and a call for every answer."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.chat_formats import Format, parse_row
from svc.dataset.schema.example import ChatExample, parse_example
from svc.dataset.schema.tool_calls import ToolCall, answer_text, calls_in
from tests.svc.chats import turn

USER, ANSWER = turn("user", "Rain?"), turn("assistant", "No.")
NAMES = st.text(min_size=1, max_size=5)
FUNCTION = {"name": "rain", "description": "Tells it.", "parameters": {"type": "object", "properties": {}}}


def calling(*ids: str | None, **more: Any) -> dict[str, Any]:
    """Return an assistant turn with one call per id."""
    function = {"name": "rain", "arguments": "{}", **more}
    calls = [{"type": "function", "function": function} | ({"id": name} if name else {}) for name in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def giving(identity: str | None = None) -> dict[str, Any]:
    """Return a tool turn that answers a call."""
    return turn("tool", "dry") | ({"tool_call_id": identity} if identity else {})


def parse(*turns: Any, **more: Any) -> ChatExample:
    return parse_example({"messages": [USER, *turns], **more})


def refusal(*turns: Any, **more: Any) -> RowError:
    with pytest.raises(RowError) as caught:
        parse(*turns, **more)
    return caught.value


@pytest.mark.parametrize(
    "turns",
    [
        (calling("1"), giving("1")),
        (calling("1"), giving()),
        (calling(None), giving()),
        (calling(None), giving("1")),
        (calling("1", "2"), giving("2"), giving("1")),
        (calling("1", "2"), giving(), giving()),
        (calling(None, None), giving(), giving()),
        (calling(None, None), giving()),
        (calling("1"), giving("1"), calling("1"), giving("1")),
        (calling("1"), giving("1"), ANSWER, USER, calling("2"), giving("2")),
    ],
)
def test_tool_calls_with_results_are_accepted(turns: tuple[Any, ...]) -> None:
    assert parse(*turns, ANSWER).answer == "No."


def test_answer_text_of_a_tool_call_does_not_depend_on_argument_order() -> None:
    first = parse(calling("1", arguments='{"city": "Rome", "days": 2}'), tools=[FUNCTION])
    second = parse(calling("2", arguments={"days": 2, "city": "Rome"}), tools=[FUNCTION])
    assert first.answer == second.answer == '{"name": "rain", "arguments": {"city": "Rome", "days": 2}}'


def test_text_precedes_tool_calls_in_an_answer_that_contains_both() -> None:
    example = parse(calling("1", "2") | {"content": "I look."}, tools=[FUNCTION])
    assert example.answer.splitlines() == ["I look.", *['{"name": "rain", "arguments": {}}'] * 2]


def test_turn_with_tool_calls_may_omit_content() -> None:
    called = calling("1")
    del called["content"]
    assert parse(called, tools=[FUNCTION]).calls_tools


def test_final_tool_call_without_tool_definitions_is_rejected() -> None:
    assert refusal(calling("1")).code is Code.WRONG_TOOLS


@pytest.mark.slow
@given(
    text=st.text(max_size=20),
    calls=st.lists(st.tuples(NAMES, st.dictionaries(st.text(max_size=5), st.text() | st.integers()))),
)
def test_tool_calls_round_trip_through_answer_text(text: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    made = answer_text(text, [ToolCall(name, json.dumps(arguments)) for name, arguments in calls])
    assert calls_in(made) == calls


def test_whitespace_between_text_and_tool_call_is_stripped_from_the_answer() -> None:
    assert answer_text("I look.\n\n", [ToolCall("rain", "{}")]) == 'I look.\n{"name": "rain", "arguments": {}}'


@pytest.mark.parametrize("arguments", ['{"a": "\\ud83d"}', '{"a": 1e999}'], ids=["lone surrogate", "infinity"])
def test_tool_call_arguments_not_representable_in_json_or_utf8_are_stored_as_a_string(arguments: str) -> None:
    text = answer_text("", [ToolCall("rain", arguments)])
    assert calls_in(text.encode("utf-8").decode("utf-8")) == [("rain", arguments)]


def test_truncated_tool_call_arguments_are_stored_as_a_string() -> None:
    assert calls_in(answer_text("", [ToolCall("rain", '{"city": "Ro')])) == [("rain", '{"city": "Ro')]


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        ((giving(),), "messages[1]"),
        ((ANSWER, giving()), "messages[2]"),
        ((calling("1"), giving("2")), "messages[2]"),
        ((calling("1"), giving("1"), giving("1")), "messages[3]"),
        ((calling("1"), giving("1"), giving()), "messages[3]"),
        ((calling(None), giving(), giving()), "messages[3]"),
        ((calling("1"), giving("1"), ANSWER, giving("1")), "messages[4]"),
        ((calling("1"),), "messages[1].tool_calls"),
        ((calling(None),), "messages[1].tool_calls"),
        ((calling("1", "2"), giving("1")), "messages[1].tool_calls"),
        ((calling("1"), USER), "messages[1].tool_calls"),
    ],
)
def test_tool_call_without_a_result_and_result_without_a_call_are_rejected(turns: tuple[Any, ...], field: str) -> None:
    error = refusal(*turns, ANSWER)
    assert (error.code, error.field) == (Code.WRONG_TURNS, field)


@pytest.mark.slow
@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), unique=True, min_size=1), st.randoms(), st.data())
def test_tool_results_may_come_in_any_order_but_must_be_complete(
    ids: list[str], chance: Any, data: st.DataObject
) -> None:
    answers = [giving(name) for name in ids]
    chance.shuffle(answers)
    parse(calling(*ids), *answers, ANSWER)
    del answers[data.draw(st.integers(0, len(answers) - 1))]
    assert refusal(calling(*ids), *answers, ANSWER).code is Code.WRONG_TURNS


def test_error_for_a_sharegpt_observation_without_a_tool_call_uses_the_sharegpt_field_name() -> None:
    turns = [("human", "q"), ("gpt", "x"), ("observation", "no"), ("gpt", "b")]
    value = {"conversations": [{"from": who, "value": said} for who, said in turns]}
    with pytest.raises(RowError) as caught:
        parse_row(value, Format.SHAREGPT)
    assert (caught.value.code, caught.value.field) == (Code.WRONG_TURNS, "conversations[2].value")


@pytest.mark.slow
def test_tool_call_validation_time_is_linear_in_the_number_of_tools_and_calls() -> None:
    ids = [str(number) for number in range(20_000)]
    tools = [{"name": f"f{name}"} for name in ids]
    calls = [{"id": name, "function": {"name": f"f{name}", "arguments": "{}"}} for name in ids]
    turns = [{"role": "assistant", "content": None, "tool_calls": calls}, *map(giving, reversed(ids)), ANSWER]
    began = time.process_time()
    assert len(parse(*turns, tools=tools).messages) == 20_003
    assert time.process_time() - began < 5


def test_duplicate_tool_call_id_is_rejected() -> None:
    assert refusal(calling("1", "1"), giving("1"), giving("1"), ANSWER).code is Code.WRONG_TOOLS


def test_call_to_an_undeclared_tool_is_rejected() -> None:
    error = refusal(calling("1", name="snow"), giving("1"), ANSWER, tools=[FUNCTION])
    assert error.code is Code.WRONG_TOOLS
    assert "'snow'" in error.wrong and "rain" in error.expected
    assert parse(calling("1"), giving("1"), ANSWER, tools=[FUNCTION]).tools


@pytest.mark.parametrize(
    "arguments",
    ["x", "[1]", '{"city": NaN}', '{"city": 1, "city": 2}', '{"city": "\\ud800"}', {"city": "\ud800"}, [], 5],
    ids=repr,
)
def test_tool_call_arguments_must_be_a_strict_json_object(arguments: Any) -> None:
    error = refusal(calling("1", arguments=arguments), giving("1"), ANSWER)
    assert error.code in (Code.WRONG_TOOLS, Code.WRONG_CONTENT)


def test_tool_call_arguments_encoded_as_json_twice_are_decoded() -> None:
    inner = json.dumps({"city": "Rome"})
    twice = parse(calling("1", arguments=json.dumps(inner)), giving("1"), ANSWER)
    [call] = twice.messages[1].tool_calls
    assert (call.arguments, call.encoded_twice) == (inner, True)
    assert twice == parse(calling("1", arguments=inner), giving("1"), ANSWER)


@pytest.mark.parametrize("more", [{"name": " "}, {"name": 5}, {"name": None}], ids=repr)
def test_tool_call_without_a_name_is_rejected(more: dict[str, Any]) -> None:
    assert refusal(calling("1", **more), giving("1"), ANSWER).code is Code.WRONG_TOOLS


def test_tool_call_type_other_than_function_is_rejected() -> None:
    made = calling("1")
    made["tool_calls"][0]["type"] = "banana"
    assert refusal(made, giving("1"), ANSWER).code is Code.WRONG_TOOLS


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "banana", "function": FUNCTION}],
        [FUNCTION, FUNCTION],
        *([FUNCTION | {key: value}] for key, value in [("name", ""), ("name", " "), ("description", 5)]),
        *([FUNCTION | {"parameters": value}] for value in ("x", "", [1], [], 0)),
        '[{"name": "f", "parameters": {"a": NaN}}]',
        '[{"name": "f", "name": "g"}]',
    ],
    ids=json.dumps,
)
def test_tool_definitions_that_no_api_would_accept_are_rejected(tools: Any) -> None:
    assert refusal(ANSWER, tools=tools).code is Code.WRONG_TOOLS


@pytest.mark.parametrize(
    "function", [{"name": "f"}, {"name": "f", "description": None, "parameters": None, "strict": True}], ids=json.dumps
)
def test_optional_tool_fields_may_be_omitted(function: dict[str, Any]) -> None:
    assert len(parse(ANSWER, tools=[function, {"type": "function", "function": FUNCTION}]).tools) == 2


def test_legacy_function_call_fields_are_rejected_instead_of_ignored() -> None:
    called = {"role": "assistant", "content": "I look.", "function_call": {"name": "rain", "arguments": "{}"}}
    assert refusal(called, USER, ANSWER).code is Code.WRONG_TOOLS
    assert refusal(ANSWER, functions=[FUNCTION]).code is Code.WRONG_TOOLS
    assert parse(ANSWER | {"function_call": None}, functions=[]) == parse(ANSWER)
