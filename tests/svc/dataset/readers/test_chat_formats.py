"""Tests that every format becomes the same chat example, and that errors name the invalid field."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.chat_formats import Format, parse_row, recognise
from svc.dataset.readers.reader import read_examples, read_lines
from svc.dataset.schema.example import ChatExample, Message, Role, parse_example
from svc.dataset.schema.tool_calls import ToolCall
from svc.errors import DataError
from tests.svc.chats import chat, turn, write_lines
from tests.svc.dataset.rows import TEXT_FORMATS, row
from tests.svc.json_values import json_values
from trainer.data.fingerprint import fingerprint

EXPECTED = ChatExample((Message(Role.SYSTEM, "be short"), Message(Role.USER, "which"), Message(Role.ASSISTANT, "that")))
CALL = {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": '{"city": "Rome"}'}}
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}
WITH_TOOLS = {
    "messages": [
        turn("user", "Rain?") | {"name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        turn("tool", "no") | {"tool_call_id": "c1", "name": "rain"},
        turn("assistant", "No."),
    ],
    "tools": [TOOL],
}


def parse(value: Any) -> ChatExample:
    form = recognise(value)
    assert form is not None
    return parse_row(value, form)[0]


def refusal(value: Any, form: Format | None = None) -> RowError:
    with pytest.raises(RowError) as caught:
        parse_row(value, form or recognise(value) or Format.CHAT)
    assert caught.value.todo
    return caught.value


@pytest.mark.parametrize("form", TEXT_FORMATS)
def test_every_chat_format_yields_the_same_example(form: Format) -> None:
    value = row(form, "be short", "which", "that")
    assert recognise(value) is form
    assert parse(value) == EXPECTED


@pytest.mark.parametrize(
    "value",
    [
        {"instruction": "i", "output": "o"},
        {"instruction": "i", "input": None, "output": "o", "system": None},
        {"prompt": "i", "completion": "o"},
        {"prompt": [turn("user", "i")], "completion": [turn("assistant", "o")]},
        {"conversations": [{"from": "user", "value": "i"}, {"from": "model", "value": "o"}]},
        {"conversations": [turn("user", "i"), turn("assistant", "o")]},
        {"messages": [turn("user", "i"), turn("assistant", "o")], "prompt": "i", "category": "x"},
        {"messages": [turn("user", "i"), turn("assistant", "o")], "completion": None, "tools": []},
        {"messages": [turn("user", "i"), turn("assistant", "o")], "input": "x", "output": "y", "completion": "z"},
        {"messages": [turn("user", "i"), turn("assistant", "o")], "instruction": "x", "system": " "},
        {"prompt": "i", "completion": "o", "instruction": "x", "input": "y"},
        {"messages": [turn("user", "i") | {"name": ""}, turn("assistant", "o") | {"tool_calls": None}]},
    ],
    ids=str,
)
def test_common_field_name_variants_are_accepted(value: Any) -> None:
    assert parse(value) == chat("i", "o")


def test_alpaca_input_follows_the_instruction_and_history_precedes_it() -> None:
    value = {"instruction": "Translate.", "input": "bread", "output": "pain", "history": [["Hello", "Bonjour"]]}
    assert [message.content for message in parse(value).messages] == ["Hello", "Bonjour", "Translate.\n\nbread", "pain"]


def test_tools_survive_a_round_trip() -> None:
    example = parse(WITH_TOOLS)
    assert example.messages[1].tool_calls == (ToolCall("rain", '{"city": "Rome"}', "c1"),)
    assert (example.messages[0].name, example.messages[2].tool_call_id) == ("Ada", "c1")
    assert example.as_dict()["tools"] == [TOOL]
    assert example.as_dict()["messages"][1]["tool_calls"] == [CALL]
    assert parse_example(json.loads(json.dumps(example.as_dict()))) == example


def test_xlam_answers_become_the_tool_calls_of_the_final_turn() -> None:
    """Uses the data set's documented example, whose tools and answers are lists or, as in its file, JSON text."""
    value = json.loads(Path(__file__).with_name("xlam_example.json").read_text())
    example = parse(value)
    assert example == parse({key: part if key == "query" else json.dumps(part) for key, part in value.items()})
    assert example.question.startswith("Find the sum of all the multiples of 3 and 5")
    assert example.answer.splitlines() == [
        '{"name": "math_toolkit.sum_of_multiples", '
        '"arguments": {"lower_limit": 1, "multiples": [3, 5], "upper_limit": 1000}}',
        '{"name": "math_toolkit.product_of_primes", "arguments": {"count": 5}}',
    ]


def test_xlam_keys_in_a_prompt_completion_row_are_ignored() -> None:
    assert parse({"prompt": "i", "completion": "o", "query": "x", "answers": "[]"}) == chat("i", "o")


def test_xlam_row_may_have_a_system_prompt() -> None:
    example = parse({"system": "Be short.", "query": "Rain?", "answers": [CALL["function"]], "tools": [TOOL]})
    assert [message.role for message in example.messages] == [Role.SYSTEM, Role.USER, Role.ASSISTANT]


def test_sharegpt_function_calls_become_tool_calls() -> None:
    turns = [("human", "Rain?"), ("function_call", '{"name": "rain", "arguments": {"city": "Rome"}}')]
    turns += [("observation", "no"), ("gpt", "No.")]
    value = {"conversations": [{"from": who, "value": said} for who, said in turns], "tools": json.dumps([TOOL])}
    example = parse(value)
    assert [message.role for message in example.messages] == [Role.USER, Role.ASSISTANT, Role.TOOL, Role.ASSISTANT]
    assert example.messages[1].tool_calls == (ToolCall("rain", '{"city": "Rome"}'),)
    assert example.tools == (json.dumps(TOOL),)


BESIDE = (Format.CHAT, Format.SHAREGPT, Format.ALPACA, Format.PROMPT_COMPLETION)
"""Formats with a separate key for the system prompt. In OpenAI evals formats, the system prompt is a turn."""


@pytest.mark.parametrize("form", BESIDE)
def test_system_prompt_may_be_in_a_separate_field(form: Format) -> None:
    value = row(form, "be short", "which", "that")
    if form in (Format.CHAT, Format.SHAREGPT):
        key = "messages" if form is Format.CHAT else "conversations"
        value = {"system": "be short", key: value[key][1:]}
    example, fields = parse_row(value, form)
    assert example == EXPECTED
    assert fields[0] == "system"


@pytest.mark.parametrize(
    ("system", "turns", "field"),
    [
        (5, [turn("user", "a"), turn("assistant", "b")], "system"),
        ("s", [turn("user", "a"), turn("boss", "b")], "messages[1].role"),
        ("s", [turn("system", "a"), turn("user", "a"), turn("assistant", "b")], "messages[0]"),
        ("s", [turn("user", "a"), turn("assistant", "b") | {"tool_calls": ["x"]}], "messages[1].tool_calls[0]"),
        ("s", None, "messages"),
        ("s", "x", "messages"),
        (None, "x", "messages"),
    ],
)
def test_errors_name_the_original_field_if_the_system_prompt_is_outside_the_messages(
    system: Any, turns: Any, field: str
) -> None:
    assert refusal({"system": system, "messages": turns}, Format.CHAT).field == field


def with_weights(*weights: int | None) -> ChatExample:
    turns: list[dict[str, Any]] = []
    for weight in weights:
        turns += [turn("user", "q"), turn("assistant", "a") | ({} if weight is None else {"weight": weight})]
    return parse_example({"messages": turns})


@pytest.mark.parametrize(
    ("weights", "learnt"),
    [
        ((None, None), (3,)),
        ((0, 1), (3,)),
        ((1, 0), (1,)),
        ((1, 1), (1, 3)),
        ((0, None, 1), (3, 5)),
        ((1, None), (1, 3)),
    ],
)
def test_message_weights_decide_which_turns_are_trained_on(
    weights: tuple[int | None, ...], learnt: tuple[int, ...]
) -> None:
    example = with_weights(*weights)
    assert example.learnt == learnt
    assert parse_example(example.as_dict()) == example


@pytest.mark.parametrize(
    ("weights", "learnt"), [((None, None), (1, 3)), ((0, None), (3,)), ((1, 0), (1,)), ((None,), (1,))]
)
def test_message_weights_override_the_option_to_train_on_all_answers(
    weights: tuple[int | None, ...], learnt: tuple[int, ...]
) -> None:
    assert with_weights(*weights).learning_all.learnt == learnt


def test_thinking_in_an_assistant_turn_is_kept() -> None:
    thought = turn("assistant", "4") | {"reasoning_content": "2 and 2"}
    example = parse_example({"messages": [turn("user", "2 + 2?"), thought]})
    assert example.messages[-1].reasoning == "2 and 2"
    assert parse_example(example.as_dict()) == example
    assert example.templated()["conversation"][-1]["reasoning_content"] == "2 and 2"
    assert parse_example({"messages": [turn("user", "q"), thought | {"reasoning_content": ""}]}).messages[1] == Message(
        Role.ASSISTANT, "4"
    )


def test_thinking_in_a_user_turn_is_an_error() -> None:
    turns = [turn("user", "q") | {"reasoning_content": "hm"}, turn("assistant", "a")]
    with pytest.raises(RowError, match="is in a user turn") as caught:
        parse_example({"messages": turns})
    assert caught.value.field == "messages[0].reasoning_content"


def test_greeting_before_the_first_question_is_not_trained_on() -> None:
    turns = [turn("assistant", "hello"), *(message.as_dict() for message in with_weights(None, None).messages)]
    example = parse_example({"messages": turns})
    assert example.learning_all.learnt == (2, 4)
    with pytest.raises(RowError, match="weight 0"):
        parse_example({"messages": [turns[0] | {"weight": 1}, turns[1], turns[2] | {"weight": 0}]})


def test_fingerprint_of_a_plain_chat_equals_the_recorded_value() -> None:
    assert fingerprint([chat("a", "b")]) == ("sha256:01060f258c742b9d436aa1de5b903edb809032b7416b567d156163f40aefc0d5")


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        ({"instruction": "i", "output": ""}, Code.WRONG_CONTENT, "output is blank"),
        ({"instruction": "i", "input": 3, "output": "o"}, Code.WRONG_CONTENT, "input is a number"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, Code.WRONG_FORMAT, 'history[0] is ["q"]'),
        ({"instruction": "i", "output": "o", "history": 5}, Code.WRONG_FORMAT, "history is a number"),
        ({"instruction": "i", "output": "o", "history": 0}, Code.WRONG_FORMAT, "history is a number"),
        ({"instruction": "i", "output": "o", "history": True}, Code.WRONG_FORMAT, "history is a boolean"),
        ({"instruction": "i", "output": "o", "history": {}}, Code.WRONG_FORMAT, "history is an object"),
        ({"instruction": "i", "output": "o", "history": "x"}, Code.WRONG_FORMAT, "history is a string"),
        ({"prompt": 3, "completion": "o"}, Code.WRONG_CONTENT, "prompt is a number"),
        ({"prompt": ["x"], "completion": "o"}, Code.WRONG_FORMAT, "prompt[0] is a string"),
        ({"prompt": [turn("boss", "x")], "completion": "o"}, Code.WRONG_ROLE, "prompt[0].role is 'boss'"),
        ({"conversations": []}, Code.WRONG_FORMAT, "conversations is an empty list"),
        ({"conversations": [{"from": "Human", "value": "x"}]}, Code.WRONG_ROLE, "conversations[0].from is 'Human'"),
        ({"conversations": [{"value": "x"}]}, Code.WRONG_ROLE, "conversations[0].from is missing"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, Code.NO_USER_TURN, "no user turn"),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "tool_call", "value": "rain()"}]},
            Code.WRONG_TOOLS,
            "conversations[1].value is",
        ),
        ({"prompt": "a", "completion": "b", "conversations": []}, Code.MIXED_FORMATS, "the line combines"),
        (
            {"messages": [turn("user", "a"), turn("assistant", "b")], "instruction": "a", "output": "b"},
            Code.MIXED_FORMATS,
            "combines 'messages' with 'instruction' and 'output'",
        ),
        ({"messages": [turn("user", "a"), turn("assistant", "b") | {"weight": 2}]}, Code.WRONG_WEIGHT, "weight is 2"),
        ({"messages": [turn("user", "a"), turn("assistant", "b") | {"weight": 0}]}, Code.WRONG_WEIGHT, "weight 0"),
        ({"messages": [turn("user", "a") | {"weight": 1}, turn("assistant", "b")]}, Code.WRONG_WEIGHT, "user turn"),
        (
            {"messages": [turn("user", "a") | {"name": 5}, turn("assistant", "b")]},
            Code.WRONG_CONTENT,
            "name is a number",
        ),
        ({"messages": [turn("user", "a"), turn("tool", "b"), turn("assistant", "c")]}, Code.WRONG_TURNS, "a tool turn"),
        ({**WITH_TOOLS, "tools": [{"type": "x"}]}, Code.WRONG_TOOLS, "tools[0] is"),
        ({**WITH_TOOLS, "tools": "rain"}, Code.WRONG_TOOLS, 'tools is "rain"'),
        ({"messages": WITH_TOOLS["messages"][:2]}, Code.WRONG_TOOLS, "final turn, but the example defines no tools"),
        ({"query": "Rain?", "answers": "[]", "tools": [TOOL]}, Code.WRONG_TOOLS, 'answers is "[]"'),
        (
            {"messages": [turn("user", "a"), {"role": "assistant", "content": "", "tool_calls": ["x"]}]},
            Code.WRONG_TOOLS,
            "messages[1].tool_calls[0] is",
        ),
        (
            {
                "messages": [
                    turn("user", "a"),
                    turn("assistant", "b") | {"tool_calls": [{"function": {"name": "f", "arguments": "["}}]},
                ]
            },
            Code.WRONG_TOOLS,
            "tool_calls[0].function.arguments is [",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_row_is_rejected_with_the_field_name(value: Any, code: Code, text: str) -> None:
    error = refusal(value)
    assert error.code is code
    assert text in error.wrong
    assert not error.field or error.wrong.startswith(error.field)


def test_deeply_nested_tools_are_rejected() -> None:
    deep: Any = "x"
    for _ in range(200):
        deep = {"a": deep}
    function = {"name": "f", "parameters": deep}
    assert refusal({**WITH_TOOLS, "tools": [{"type": "function", "function": function}]}).code is Code.WRONG_TOOLS


def test_file_format_is_the_format_of_most_rows(tmp_path: Path) -> None:
    rows = [row(Format.ALPACA, "", f"question {number}", "a") for number in range(5)]
    path = write_lines(tmp_path / "x.jsonl", row(Format.CHAT, "s", "u", "a"), *rows)
    errors = [line.error for line in read_lines(path)]
    assert errors[0] is not None and errors[0].code is Code.MIXED_FORMATS
    assert errors[1:] == [None] * 5


def test_data_files_of_one_dataset_may_have_different_formats(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / f"{form}.jsonl", row(form, "be short", "which", "that")) for form in TEXT_FORMATS]
    assert read_examples(paths) == [EXPECTED] * len(paths)


keys = st.sampled_from(
    [
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "prompt",
        "completion",
        "system",
        "tools",
        "history",
    ]
)
turns = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from([*Role]) | json_values,
            "from": st.sampled_from(["human", "gpt", "function_call"]) | json_values,
            "content": st.text(max_size=5) | json_values,
            "value": st.text(max_size=5) | json_values,
            "tool_calls": st.just([CALL]) | json_values,
            "weight": st.integers(0, 1) | json_values,
            "name": st.text(max_size=3) | json_values,
        },
    )
    | json_values,
    max_size=4,
)


@pytest.mark.slow
@given(st.dictionaries(keys, turns | st.text(max_size=5) | json_values, max_size=6), st.sampled_from(list(Format)))
def test_any_row_either_round_trips_as_an_example_or_is_an_error(value: dict[str, Any], form: Format) -> None:
    try:
        example, fields = parse_row(value, form)
    except DataError:
        return
    assert parse_example(example.as_dict()) == example
    assert len(fields) == len(example.messages)
    assert example.answer.strip()
    assert all(example.messages[place].role is Role.ASSISTANT for place in example.learnt)
