"""The forms in which people keep examples, and how each becomes a chat example.

A format is recognised by its keys. Nothing is guessed: a row with the keys of two formats is an error. Knows nothing of
files.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.openai_evals import turns_of_item, turns_of_line, turns_of_output
from svc.dataset.schema.example import ChatExample, parse_example
from svc.dataset.schema.tool_calls import decode_inner, json_text, kind_of

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_CALLS = {"function_call", "tool_call"}
_PLACE = re.compile(r"messages\[(\d+)\](?:\.(\w+))?")


class Format(StrEnum):
    """How a row says what was asked and answered."""

    CHAT = "chat"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt_completion"
    OPENAI_EVALS = "openai_evals"
    OPENAI_EVALS_ITEM = "openai_evals_item"
    OPENAI_EVALS_OUTPUT = "openai_evals_output"


KEYS: dict[Format, tuple[str, ...]] = {
    Format.CHAT: ("messages",),
    Format.SHAREGPT: ("conversations",),
    Format.ALPACA: ("instruction", "output"),
    Format.PROMPT_COMPLETION: ("prompt", "completion"),
    Format.OPENAI_EVALS: ("input", "ideal"),
    Format.OPENAI_EVALS_OUTPUT: ("datasource_item",),
    Format.OPENAI_EVALS_ITEM: ("item",),
}
"""The keys that a row of the format has; one with the keys of several has the first."""
_OWN_KEYS = {Format.OPENAI_EVALS_ITEM, Format.OPENAI_EVALS_OUTPUT}
"""Formats whose key may as well be one of somebody's own beside another format's."""
READ_KEYS = frozenset(key for keys in KEYS.values() for key in keys) | {
    "input",
    "system",
    "history",
    "tools",
    "functions",
    "sample",
}
"""All keys of a row that are looked at."""


@dataclass(frozen=True, slots=True)
class _Turns:
    """Chat turns, and for each the name of the field in the file that its role and its content come from."""

    turns: list[dict[str, Any]]
    fields: list[tuple[str, str]]

    def add(self, role: Any, content: Any, field: str, role_field: str = "", **more: Any) -> None:
        self.turns.append({"role": role, "content": content, **more})
        self.fields.append((role_field or field, field))


def recognise(value: Any) -> Format | None:
    """The format whose keys a row has; where it has those of several, the first."""
    if not isinstance(value, dict):
        return None
    return next((form for form, keys in KEYS.items() if all(value.get(key) is not None for key in keys)), None)


def header_fault(names: Sequence[str]) -> RowError | None:
    """What is wrong with the column names of a table: two columns for one key, of which only one could be read."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name in READ_KEYS]
    if not twice:
        return None
    return RowError(Code.WRONG_FORMAT, f"the header has {_quoted(twice)} twice", expected="one column for each key")


def parse_row(value: Any, form: Format) -> tuple[ChatExample, tuple[str, ...]]:
    """Makes a chat example of a row.

    Args:
        form: the format of the file.

    Returns:
        The example, and for each message the field that holds its text.

    Raises:
        RowError: the row has another format, or is wrong in its own; fields are named as the file names them.
    """
    found = recognise(value)
    if found is not None and found is not form:
        raise RowError(
            Code.MIXED_FORMATS,
            f"a row in the format {found.value} in a file of {form.value}",
            expected=f"{_quoted(KEYS[form])} in every row",
        )
    if not isinstance(value, dict):
        raise RowError(
            Code.WRONG_FORMAT, f"the line is {kind_of(value)}", expected=f"an object with {_quoted(KEYS[form])}"
        )
    _check_keys(value, form)
    if form is Format.CHAT:
        return _read_chat(value)
    if form in _EVALS:
        return _read_evals(value, form)
    chat = _Turns([], [])
    _READERS[form](value, chat)
    try:
        example = parse_example({"messages": chat.turns, "tools": value.get("tools")})
    except RowError as error:
        raise error.at(_source_field(error.field, chat.fields)) from error
    return example, tuple(field for _, field in chat.fields)


def _check_keys(value: dict[str, Any], form: Format) -> None:
    missing = [key for key in KEYS[form] if key not in value]
    if missing:
        raise RowError(
            Code.WRONG_FORMAT, f"no {_quoted(missing)}, only {sorted(value)!r:.200}", expected=_quoted(KEYS[form])
        )
    for other, keys in KEYS.items():
        if (
            other is not form
            and other not in _OWN_KEYS
            and keys[0] in value
            and all(value.get(key) is not None for key in keys)
        ):
            raise RowError(
                Code.MIXED_FORMATS, f"{_quoted(KEYS[form])} beside {_quoted(keys)}", expected="one format in a line"
            )


def _read_chat(value: dict[str, Any]) -> tuple[ChatExample, tuple[str, ...]]:
    """The turns are as they are to be, but a system prompt may stand beside them, as Anthropic's API has it."""
    system, turns = value.get("system"), value["messages"]
    if _absent(system) or not isinstance(turns, list):
        example = parse_example(value)
        return example, tuple(f"messages[{place}].content" for place in range(len(example.messages)))
    try:
        example = parse_example(value | {"messages": [{"role": "system", "content": system}, *turns]})
    except RowError as error:
        raise error.at(_PLACE.sub(_without_system, error.field)) from error
    return example, ("system", *(f"messages[{place}].content" for place in range(len(turns))))


def _read_evals(value: dict[str, Any], form: Format) -> tuple[ChatExample, tuple[str, ...]]:
    """Turns are named as they are made: they come from several places of a row."""
    example = parse_example({"messages": _EVALS[form](value)})
    return example, tuple(f"messages[{place}].content" for place in range(len(example.messages)))


_EVALS: dict[Format, Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    Format.OPENAI_EVALS: turns_of_line,
    Format.OPENAI_EVALS_ITEM: turns_of_item,
    Format.OPENAI_EVALS_OUTPUT: turns_of_output,
}


def _without_system(place: re.Match[str]) -> str:
    """`messages[1].role` as it is named without a system turn before it."""
    number = int(place[1])
    return place[0].replace(f"[{number}]", f"[{number - 1}]", 1) if number else "system"


def _source_field(field: str, fields: list[tuple[str, str]]) -> str:
    """`messages[1].content` as the file names it."""
    place = _PLACE.match(field)
    if not place:
        return field
    role_field, content_field = fields[int(place[1])]
    match place[2]:
        case "role":
            return role_field
        case None | "content":
            return content_field
        case other:
            return f"{content_field} {other}"


def _read_alpaca(value: dict[str, Any], chat: _Turns) -> None:
    if not _absent(value.get("system")):
        chat.add("system", value["system"], "system")
    history = value.get("history")
    if not _absent(history) and not isinstance(history, list):
        raise RowError(Code.WRONG_FORMAT, f"is {kind_of(history)}", field="history", expected="a list of pairs")
    for index, pair in enumerate(history if isinstance(history, list) else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(
                Code.WRONG_FORMAT,
                f"is {json_text(pair):.80}",
                field=f"history[{index}]",
                expected="a question and its answer",
            )
        chat.add("user", pair[0], f"history[{index}]")
        chat.add("assistant", pair[1], f"history[{index}]")
    instruction, context = value["instruction"], value.get("input")
    if not _absent(context):
        if not isinstance(context, str):
            raise RowError(Code.WRONG_CONTENT, f"is {kind_of(context)}", field="input", expected="a string")
        if isinstance(instruction, str):
            instruction = f"{instruction}\n\n{context}" if instruction.strip() else context
    chat.add("user", instruction, "instruction")
    chat.add("assistant", value["output"], "output")


def _read_prompt_completion(value: dict[str, Any], chat: _Turns) -> None:
    """Both as text, or both as lists of turns, as TRL has it."""
    if not _absent(value.get("system")):
        chat.add("system", value["system"], "system")
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if not isinstance(value[key], list):
            chat.add(role, value[key], key)
            continue
        for index, turn in enumerate(value[key]):
            field = f"{key}[{index}]"
            if not isinstance(turn, dict):
                raise RowError(Code.WRONG_FORMAT, f"is {kind_of(turn)}", field=field, expected="a turn")
            rest = {name: inner for name, inner in turn.items() if name not in ("role", "content")}
            chat.add(turn.get("role"), turn.get("content"), f"{field}.content", f"{field}.role", **rest)


def _read_sharegpt(value: dict[str, Any], chat: _Turns) -> None:
    turns = value["conversations"]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else kind_of(turns)
        raise RowError(Code.WRONG_FORMAT, f"is {found}", field="conversations", expected="a list of turns")
    if not _absent(value.get("system")):
        chat.add("system", value["system"], "system")
    for index, turn in enumerate(turns):
        field = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise RowError(
                Code.WRONG_FORMAT, f"is {kind_of(turn)}", field=field, expected='{"from": ..., "value": ...}'
            )
        who, text = ("from", "value") if turn.get("from") is not None or "role" not in turn else ("role", "content")
        speaker, content = turn.get(who), turn.get(text)
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            found = f"{speaker!r:.80}" if who in turn else "missing"
            raise RowError(
                Code.WRONG_ROLE,
                f"is {found}",
                field=f"{field}.{who}",
                expected=f"one of {', '.join(_SHAREGPT_ROLES)}",
            )
        more: dict[str, Any] = {"weight": turn.get("weight"), "name": turn.get("name")}
        if speaker in _CALLS:
            more["tool_calls"], content = _called(content, f"{field}.{text}"), None
        chat.add(_SHAREGPT_ROLES[speaker], content, f"{field}.{text}", f"{field}.{who}", **more)


def _called(content: Any, field: str) -> list[dict[str, Any]]:
    """The calls in a turn whose text is one, or a list of them: `{"name": ..., "arguments": ...}`."""
    decoded = decode_inner(content) if isinstance(content, str) else content
    calls = decoded if isinstance(decoded, list) else [decoded]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(
            Code.WRONG_TOOLS,
            f"is {json_text(content):.80}",
            field=field,
            expected='{"name": ..., "arguments": {...}} as JSON text',
        )
    return [{"type": "function", "function": call} for call in calls]


def _absent(value: Any) -> bool:
    """Empty text in an optional column is none: CSV and Alpaca files have it."""
    return value is None or (isinstance(value, str) and not value.strip())


def _quoted(keys: tuple[str, ...] | list[str]) -> str:
    return " and ".join(f"'{key}'" for key in keys)


_READERS: dict[Format, Callable[[dict[str, Any], _Turns], None]] = {
    Format.ALPACA: _read_alpaca,
    Format.PROMPT_COMPLETION: _read_prompt_completion,
    Format.SHAREGPT: _read_sharegpt,
}
