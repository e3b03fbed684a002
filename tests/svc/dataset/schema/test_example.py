"""Tests valid chat examples, and the errors for other values."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.readers.chat_formats import Format, parse_row
from svc.dataset.schema.example import Role, parse_example
from svc.errors import DataError
from tests.svc.chats import turn
from tests.svc.json_values import json_values

USER, ANSWER = turn("user", "Which?"), turn("assistant", "That.")


def wrong(*turns: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse_example({"messages": list(turns)})
    return str(caught.value)


def test_valid_example_is_parsed_completely() -> None:
    value = {"messages": [turn("system", "Be short."), USER, ANSWER], "id": 7}
    example = parse_example(value)
    assert example.as_dict() == {"messages": value["messages"]}
    assert example.answer == "That."
    assert [message.role for message in example.prompt] == [Role.SYSTEM, Role.USER]
    assert example.characters == len("Be short.Which?That.")


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ((USER,), "no assistant turn"),
        ((USER, ANSWER, USER), "the last turn is user"),
        ((ANSWER,), "no user turn"),
        ((USER, turn("system", "x"), ANSWER), "messages[1] is a system turn"),
        ((USER, turn("Assistant", "x")), "messages[1].role is 'Assistant'"),
        (({"content": "x"},), "messages[0].role is missing"),
        ((turn([], "x"), ANSWER), "messages[0].role is []"),  # type: ignore[arg-type]
        (({"role": "user"}, ANSWER), "messages[0].content is missing"),
        ((turn("user", None), ANSWER), "messages[0].content is null"),
        ((turn("user", 3), ANSWER), "messages[0].content is a number"),
        ((turn("user", True), ANSWER), "messages[0].content is a boolean"),
        ((USER, turn("assistant", {"section": "net"})), "messages[1].content is an object"),
        ((USER, turn("assistant", " \n")), "messages[1].content is blank"),
        ((turn("user", "\ud83d"), ANSWER), "messages[0].content contains an unpaired surrogate"),
        (("hello",), "messages[0] is a string"),
        ((), "messages is an empty list"),
    ],
)
def test_invalid_turn_error_names_the_turn_index_and_the_value(turns: tuple[Any, ...], text: str) -> None:
    assert text in wrong(*turns)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([USER, ANSWER], "the line is a list"),
        (None, "the line is null"),
        ({"message": []}, "no 'messages', only ['message']"),
        ({"messages": {"role": "user"}}, "messages is an object"),
    ],
)
def test_error_for_a_line_that_is_not_an_example_describes_the_line(value: Any, text: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_row(value, Format.CHAT)
    assert text in caught.value.wrong
    assert caught.value.expected


def test_large_invalid_value_is_truncated_in_the_error() -> None:
    assert len(wrong(turn("x" * 100_000, "y"), ANSWER)) < 300


def test_example_length_counts_all_text_shown_to_the_model() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "rain", "arguments": '{"a": "日"}'}}
    turns = [USER | {"name": "Ada"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns += [turn("tool", "no") | {"tool_call_id": "1"}, ANSWER]
    example = parse_example({"messages": turns, "tools": [{"type": "function", "function": {"name": "rain"}}]})
    assert example.characters == len('Which?Adarain{"a": "日"}noThat.') + len(example.tools[0])
    assert example.utf8_bytes == example.characters + 2


roles = st.sampled_from([*Role, "tool"]) | json_values
turns = st.lists(json_values | st.fixed_dictionaries({"role": roles, "content": st.text(max_size=9) | json_values}))


@given(json_values | st.fixed_dictionaries({"messages": json_values | turns}))
def test_any_json_value_yields_an_example_or_a_data_error(value: Any) -> None:
    try:
        example, _ = parse_row(value, Format.CHAT)
    except DataError:
        return
    assert parse_example(example.as_dict()) == example
    assert example.answer.strip()
