"""Tests that OpenAI evals results become chat examples, unless their question or answer is ambiguous."""

from typing import Any

import pytest

from svc.dataset.problem.problem import RowError
from svc.dataset.readers.chat_formats import Format, parse_row, recognise
from svc.dataset.schema.example import ChatExample


def parse(value: Any) -> ChatExample:
    form = recognise(value)
    assert form is not None
    return parse_row(value, form)[0]


OUTPUT = {
    "object": "eval.run.output_item",
    "datasource_item_id": 5,
    "datasource_item": {"input": "Markets rally", "ground_truth": "Markets"},
    "sample": {
        "input": [{"role": "developer", "content": "Categorise."}, {"role": "user", "content": "Markets rally"}],
        "output": [{"role": "assistant", "content": "World"}],
    },
    "results": [{"name": "match", "passed": False, "score": 0.0}],
}


def test_evals_example_takes_its_answer_from_the_reference_rather_than_from_the_model_output() -> None:
    example = parse(OUTPUT)
    assert [(turn.role.value, turn.content) for turn in example.messages] == [
        ("system", "Categorise."),
        ("user", "Markets rally"),
        ("assistant", "Markets"),
    ]


@pytest.mark.parametrize(
    "value",
    [
        {"input": "which", "ideal": "that"},
        {"input": [{"role": "user", "content": "which"}], "ideal": ["that"]},
        {"item": {"question": "which", "correct_label": "that"}, "sample": {"output_text": "x"}},
        {"item": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "which"}]}], "ideal": "that"}},
        {"datasource_item": {"item": {"input": "which", "ideal": "that"}}},
    ],
)
def test_question_and_answer_fields_are_recognized_by_name(value: Any) -> None:
    example = parse(value)
    assert (example.question, example.answer) == ("which", "that")


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"input": "which", "ideal": ["a", "b"]}, "ideal"),
        ({"item": {"question": "which"}}, "item"),
        ({"item": {"question": "which", "input": "what", "ideal": "a"}}, "item"),
        ({"item": 5}, "item"),
        ({"input": 5, "ideal": "a"}, "input"),
        ({"datasource_item": {"ideal": "a"}}, "datasource_item"),
    ],
)
def test_ambiguous_evals_row_is_rejected_with_an_error_that_names_the_field(value: Any, field: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(value)
    assert caught.value.field == field


def test_prompt_completion_row_with_an_item_key_is_not_read_as_an_openai_evals_row() -> None:
    assert recognise({"prompt": "a", "completion": "b", "item": {"id": 5}}) is Format.PROMPT_COMPLETION
    assert parse({"prompt": "a", "completion": "b", "item": {"id": 5}}).answer == "b"
