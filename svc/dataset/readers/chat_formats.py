"""Recognizes chat data formats and converts their rows to chat examples.

A format is recognized by its keys. Ambiguous rows are never guessed at: a row that combines the keys of
two formats is an error. This module knows nothing about files.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.openai_evals import turns_of_item, turns_of_line, turns_of_output
from svc.dataset.readers.turns import Turns, is_absent, parse_called
from svc.dataset.schema.example import ChatExample, parse_document, parse_example
from svc.dataset.schema.tool_calls import expect, expect_turns, json_text, kind_of

_PLACE = re.compile(r"messages\[(\d+)\](?:\.(\w+))?")


class Format(StrEnum):
    """Layout of a row, recognized by its keys."""

    CHAT = "chat"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt_completion"
    XLAM = "xlam"
    OPENAI_EVALS = "openai_evals"
    OPENAI_EVALS_ITEM = "openai_evals_item"
    OPENAI_EVALS_OUTPUT = "openai_evals_output"
    TEXT = "text"


KEYS: dict[Format, tuple[str, ...]] = {
    Format.CHAT: ("messages",),
    Format.SHAREGPT: ("conversations",),
    Format.ALPACA: ("instruction", "output"),
    Format.PROMPT_COMPLETION: ("prompt", "completion"),
    Format.XLAM: ("query", "answers"),
    Format.OPENAI_EVALS: ("input", "ideal"),
    Format.OPENAI_EVALS_OUTPUT: ("datasource_item",),
    Format.OPENAI_EVALS_ITEM: ("item",),
    Format.TEXT: ("text",),
}
"""Required keys of each format, in the order in which `recognise` tries the formats."""
_OWN_KEYS = {Format.XLAM, Format.OPENAI_EVALS_ITEM, Format.OPENAI_EVALS_OUTPUT, Format.TEXT}
"""Formats whose keys may also occur as unrelated keys in a row of another format."""
OPTIONAL_KEYS = ("input", "system", "history", "tools", "functions", "sample")
"""Keys that some formats read in addition to the required ones."""


def recognise(value: Any) -> Format | None:
    """Return the first format whose required keys are all in the row, or None if no format matches."""
    return next((form for form in KEYS if isinstance(value, dict) and _has_keys(value, form)), None)


def parse_row(value: Any, form: Format) -> tuple[ChatExample, tuple[str, ...]]:
    """Convert a row to a chat example. Also return, for each message, the name of the field that contains its text.

    Args:
        form: the format of the file.

    Raises:
        RowError: the row is in a different format than the file, or it is not valid in that format. The
            error uses the field names of the file.
    """
    check_keys(value, recognise(value), form, KEYS[form])
    for other in KEYS:
        if other is not form and other not in _OWN_KEYS and _has_keys(value, other):
            wrong = f"the line combines {quoted(KEYS[form])} with {quoted(KEYS[other])}"
            raise RowError(Code.MIXED_FORMATS, wrong, expected="one format per line")
    if form is Format.CHAT:
        return _read_chat(value)
    if form is Format.TEXT:
        return parse_document(value), ("", "text")
    if form in _EVALS:
        return _own_fields(parse_example({"messages": _EVALS[form](value)}))
    chat = Turns()
    _READERS[form](value, chat)
    return chat.parse(value.get("tools"))


def check_keys(value: Any, own: StrEnum | None, form: StrEnum, keys: Sequence[str]) -> None:
    """Raise RowError if a row is in a different format than its file, or lacks a key of the format.

    Args:
        own: the row's format, or None if the row does not have the keys of any format.
        form: format of the file.
        keys: required keys of the file's format.
    """
    listed = quoted(keys)
    if own is not None and own is not form:
        wrong = f"the row is in format {own.value}, but the file is in format {form.value}"
        raise RowError(Code.MIXED_FORMATS, wrong, expected=f"{listed} in every row")
    if not isinstance(value, dict):
        raise RowError(Code.WRONG_FORMAT, f"the line is {kind_of(value)}", expected=f"an object with {listed}")
    if missing := [key for key in keys if key not in value]:
        wrong = f"the line has no {quoted(missing)}, only {sorted(value)!r:.200}"
        raise RowError(Code.WRONG_FORMAT, wrong, expected=listed)


def _has_keys(value: dict[str, Any], form: Format) -> bool:
    return all(value.get(key) is not None for key in KEYS[form])


def _own_fields(example: ChatExample) -> tuple[ChatExample, tuple[str, ...]]:
    """Return the example and, for each of its messages, the name of the chat row's field that contains it, such as
    `messages[1].content`.
    """
    return example, tuple(f"messages[{place}].content" for place in range(len(example.messages)))


def _read_chat(value: dict[str, Any]) -> tuple[ChatExample, tuple[str, ...]]:
    """Read turns that are already in the chat format. As in Anthropic's API, the system prompt may have its own key."""
    system, turns = value.get("system"), value["messages"]
    if is_absent(system) or not isinstance(turns, list):
        return _own_fields(parse_example(value))
    try:
        example = parse_example(value | {"messages": [{"role": "system", "content": system}, *turns]})
    except RowError as error:
        raise error.at(_PLACE.sub(_without_system, error.field)) from error
    return example, ("system", *_own_fields(example)[1][:-1])


def _without_system(place: re.Match[str]) -> str:
    """Return a field's name with an index that does not count the system turn: `messages[1].role` becomes
    `messages[0].role`.
    """
    number = int(place[1])
    return place[0].replace(f"[{number}]", f"[{number - 1}]", 1) if number else "system"


_EVALS: dict[Format, Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    Format.OPENAI_EVALS: turns_of_line,
    Format.OPENAI_EVALS_ITEM: turns_of_item,
    Format.OPENAI_EVALS_OUTPUT: turns_of_output,
}


def add_alpaca_prompt(value: dict[str, Any], chat: Turns) -> None:
    """Add the turns that precede the answer, from the columns `instruction` and, optionally, `input` and `history`.

    Raises:
        RowError: `history` or `input` is not in Alpaca's format.
    """
    history = (
        []
        if is_absent(value.get("history"))
        else expect(list, value["history"], "history", "a list of question-answer pairs")
    )
    for index, pair in enumerate(history):
        place = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            wrong = f"is {json_text(pair):.80}"
            raise RowError(Code.WRONG_FORMAT, wrong, field=place, expected="a question and its answer")
        chat.add("user", pair[0], place)
        chat.add("assistant", pair[1], place)
    instruction, context = value["instruction"], value.get("input")
    if not is_absent(context):
        expect(str, context, "input", "a string", Code.WRONG_CONTENT)
        if isinstance(instruction, str):
            instruction = f"{instruction}\n\n{context}" if instruction.strip() else context
    chat.add("user", instruction, "instruction")


def _read_alpaca(value: dict[str, Any], chat: Turns) -> None:
    chat.add_system(value)
    add_alpaca_prompt(value, chat)
    chat.add("assistant", value["output"], "output")


def _read_prompt_completion(value: dict[str, Any], chat: Turns) -> None:
    """Read a prompt and a completion, given as two texts or, as in TRL, as two lists of turns."""
    chat.add_system(value)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if not isinstance(value[key], list):
            chat.add(role, value[key], key)
            continue
        for index, turn in enumerate(value[key]):
            chat.add_chat(turn, f"{key}[{index}]")


def _read_sharegpt(value: dict[str, Any], chat: Turns) -> None:
    turns = expect_turns(value["conversations"], "conversations")
    chat.add_system(value)
    for index, item in enumerate(turns):
        chat.add_sharegpt(item, f"conversations[{index}]")


def _read_xlam(value: dict[str, Any], chat: Turns) -> None:
    """Read a question and the tool calls that answer it, both given as JSON text."""
    chat.add_system(value)
    chat.add("user", value["query"], "query")
    chat.add("assistant", None, "answers", tool_calls=parse_called(value["answers"], "answers"))


def quoted(keys: Iterable[str]) -> str:
    """Return names of keys for use in messages, such as `'prompt' and 'completion'`."""
    return " and ".join(f"'{key}'" for key in keys)


_READERS: dict[Format, Callable[[dict[str, Any], Turns], None]] = {
    Format.ALPACA: _read_alpaca,
    Format.PROMPT_COMPLETION: _read_prompt_completion,
    Format.SHAREGPT: _read_sharegpt,
    Format.XLAM: _read_xlam,
}
