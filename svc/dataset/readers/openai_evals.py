"""What OpenAI's evals leave: lines of the open-source `evals`, data sources of the hosted product, and its results.

Data sources have whatever keys their owner chose. Question and answer are known by customary names; where there is not
exactly one of each, the row is refused.
"""

from collections.abc import Sequence
from typing import Any

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.schema.tool_calls import kind_of

QUESTIONS = ("input", "messages", "prompt", "question", "query")
ANSWERS = (
    *("ideal", "ground_truth", "reference", "reference_answer", "expected", "expected_output", "expected_answer"),
    *("answer", "correct_answer", "correct_label", "label", "target"),
)
_ROLES = {"developer": "system"}


def turns_of_line(value: dict[str, Any]) -> list[dict[str, Any]]:
    """`input` and `ideal` of the open-source `evals`.

    Raises:
        RowError: names the field.
    """
    return [*_turns(value["input"], "input"), _answer(value["ideal"], "ideal")]


def turns_of_item(value: dict[str, Any]) -> list[dict[str, Any]]:
    """`{"item": {...}}` of a data source.

    Raises:
        RowError: names the field.
    """
    item = _object(value["item"], "item")
    question, answer = _key(item, QUESTIONS, "item"), _key(item, ANSWERS, "item")
    return [*_turns(item[question], f"item.{question}"), _answer(item[answer], f"item.{answer}")]


def turns_of_output(value: dict[str, Any]) -> list[dict[str, Any]]:
    """One result of a run: what was asked, with the reference of its item; what a model answered is not read.

    Raises:
        RowError: names the field.
    """
    item, sample = _object(value["datasource_item"], "datasource_item"), value.get("sample")
    item = item["item"] if isinstance(item.get("item"), dict) else item
    answer = _answer(item[key := _key(item, ANSWERS, "datasource_item")], f"datasource_item.{key}")
    if isinstance(sample, dict) and sample.get("input"):
        return [*_turns(sample["input"], "sample.input"), answer]
    question = _key(item, QUESTIONS, "datasource_item")
    return [*_turns(item[question], f"datasource_item.{question}"), answer]


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(Code.WRONG_FORMAT, f"is {kind_of(value)}", field=field, expected="an object")
    return value


def _key(item: dict[str, Any], names: Sequence[str], field: str) -> str:
    found = [name for name in names if item.get(name) is not None]
    if len(found) != 1:
        has = ", ".join(found) if found else f"none, only {sorted(item)!r:.120}"
        raise RowError(Code.WRONG_FORMAT, f"has {has}", field=field, expected=f"exactly one of {', '.join(names)}")
    return found[0]


def _turns(value: Any, field: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise RowError(Code.WRONG_FORMAT, f"is {kind_of(value)}", field=field, expected="a text or a list of turns")
    turns = []
    for turn in value:
        role = turn.get("role")
        content = _text(turn.get("content"))
        turns.append({"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content})
    return turns


def _text(content: Any) -> Any:
    """Content in parts is one text where all of them are."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if whole else content


def _answer(value: Any, field: str) -> dict[str, Any]:
    """An example has one reference: of several that count as right none is chosen here."""
    if isinstance(value, list):
        if len(value) != 1:
            wrong = f"has {len(value)} answers"
            raise RowError(Code.WRONG_CONTENT, wrong, field=field, expected="one reference answer")
        value = value[0]
    return {"role": "assistant", "content": value}
