"""Reads OpenAI evals files: lines of the open-source `evals` project, and data sources and results of the hosted
product.

The keys of a data source are chosen by its owner. Questions and answers are recognized by the usual key
names, and a row without exactly one of each is rejected.
"""

from collections.abc import Sequence
from typing import Any

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.schema.tool_calls import expect, kind_of

QUESTIONS = ("input", "messages", "prompt", "question", "query")
ANSWERS = (
    *("ideal", "ground_truth", "reference", "reference_answer", "expected", "expected_output", "expected_answer"),
    *("answer", "correct_answer", "correct_label", "label", "target"),
)


def turns_of_line(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the turns of a row in the open-source `evals` format, which has the keys `input` and `ideal`.

    Raises:
        RowError: the row is not in this format; the error names the invalid field.
    """
    return [*chat_turns(value["input"], "input"), _answer(value["ideal"], "ideal")]


def turns_of_item(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the turns of a data source row, which has the form `{"item": {...}}`.

    Raises:
        RowError: the row is not in this format; the error names the invalid field.
    """
    item = expect(dict, value["item"], "item", "an object")
    question, answer = _key(item, QUESTIONS, "item"), _key(item, ANSWERS, "item")
    return [*chat_turns(item[question], f"item.{question}"), _answer(item[answer], f"item.{answer}")]


def turns_of_output(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the question and the reference answer in an evaluation result. The model's answer is ignored.

    Raises:
        RowError: the row is not in this format; the error names the invalid field.
    """
    item, sample = expect(dict, value["datasource_item"], "datasource_item", "an object"), value.get("sample")
    item = item["item"] if isinstance(item.get("item"), dict) else item
    answer = _answer(item[key := _key(item, ANSWERS, "datasource_item")], f"datasource_item.{key}")
    if isinstance(sample, dict) and sample.get("input"):
        return [*chat_turns(sample["input"], "sample.input"), answer]
    question = _key(item, QUESTIONS, "datasource_item")
    return [*chat_turns(item[question], f"datasource_item.{question}"), answer]


def _key(item: dict[str, Any], names: Sequence[str], field: str) -> str:
    present = [name for name in names if item.get(name) is not None]
    if len(present) != 1:
        has = ", ".join(present) if present else f"none of the expected keys, only {sorted(item)!r:.120}"
        raise RowError(Code.WRONG_FORMAT, f"has {has}", field=field, expected=f"exactly one of {', '.join(names)}")
    return present[0]


def chat_turns(value: Any, field: str) -> list[dict[str, Any]]:
    """Return the role and text of each turn of a prompt in OpenAI's format. Plain text becomes a single user turn.

    Raises:
        RowError: the value is neither a text nor a list of turns.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise RowError(Code.WRONG_FORMAT, f"is {kind_of(value)}", field=field, expected="a string or a list of turns")
    roles = ("system" if turn.get("role") == "developer" else turn.get("role") for turn in value)
    return [{"role": role, "content": _text(turn.get("content"))} for role, turn in zip(roles, value, strict=True)]


def _text(content: Any) -> Any:
    """Join multi-part content into one text, if all of its parts are text."""
    if not isinstance(content, list):
        return content
    texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(content) else content


def _answer(value: Any, field: str) -> dict[str, Any]:
    """Return the reference answer as a turn. More than one accepted answer is an error."""
    if isinstance(value, list):
        if len(value) != 1:
            wrong = f"has {len(value)} answers"
            raise RowError(Code.WRONG_CONTENT, wrong, field=field, expected="one reference answer")
        value = value[0]
    return {"role": "assistant", "content": value}
