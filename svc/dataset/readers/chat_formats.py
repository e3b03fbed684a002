"""Recognizes the formats of chat data and converts their rows to chat examples.

A format is recognized by its keys. Ambiguous rows are never guessed at: a row that combines the keys of
two formats is an error. This module knows nothing about files.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.openai_evals import turns_of_item, turns_of_line, turns_of_output
from svc.dataset.schema.example import ChatExample, parse_example
from svc.dataset.schema.tool_calls import decode_inner, expect, expect_turns, json_text, kind_of

_CALLS = ("function_call", "tool_call")
_SPEAKERS = {
    "system": ("system",),
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "model", "chatgpt", "bing", "bard", *_CALLS),
    "tool": ("tool", "function_response", "observation"),
}
_SHAREGPT_ROLES = {speaker: role for role, speakers in _SPEAKERS.items() for speaker in speakers}
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


KEYS: dict[Format, tuple[str, ...]] = {
    Format.CHAT: ("messages",),
    Format.SHAREGPT: ("conversations",),
    Format.ALPACA: ("instruction", "output"),
    Format.PROMPT_COMPLETION: ("prompt", "completion"),
    Format.XLAM: ("query", "answers"),
    Format.OPENAI_EVALS: ("input", "ideal"),
    Format.OPENAI_EVALS_OUTPUT: ("datasource_item",),
    Format.OPENAI_EVALS_ITEM: ("item",),
}
"""Required keys of each format. A row with the keys of several formats is assigned to the first of them."""
_OWN_KEYS = {Format.XLAM, Format.OPENAI_EVALS_ITEM, Format.OPENAI_EVALS_OUTPUT}
"""Formats whose keys may also occur as unrelated keys in a row of another format."""
_OPTIONAL_KEYS = {"input", "system", "history", "tools", "functions", "sample"}
READ_KEYS = _OPTIONAL_KEYS.union(*KEYS.values())
"""All keys of a row that any format reads. Other keys are ignored."""


@dataclass(frozen=True, slots=True)
class _Turns:
    """Chat turns, along with the fields in the file that their roles and contents were read from."""

    turns: list[dict[str, Any]] = field(default_factory=list)
    fields: list[tuple[str, str]] = field(default_factory=list)

    def add(self, role: Any, content: Any, place: str, role_place: str = "", **more: Any) -> None:
        self.turns.append({"role": role, "content": content, **more})
        self.fields.append((role_place or place, place))

    def add_system(self, value: dict[str, Any]) -> None:
        """Add the system prompt if the row stores one separately from its turns."""
        if not _absent(value.get("system")):
            self.add("system", value["system"], "system")

    def source_field(self, name: str) -> str:
        """Translate a chat-format field such as `messages[1].content` to the field's name in the file."""
        place = _PLACE.match(name)
        if not place:
            return name
        role_field, content_field = self.fields[int(place[1])]
        match place[2]:
            case "role":
                return role_field
            case None | "content":
                return content_field
            case other:
                return f"{content_field} {other}"


def recognise(value: Any) -> Format | None:
    """Return the format whose keys a row has, or the first such format if there are several."""
    return next((form for form in KEYS if isinstance(value, dict) and _has_keys(value, form)), None)


def header_fault(names: Sequence[str]) -> RowError | None:
    """Return an error if two columns of a table have the same key, because only one of them could be read."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name in READ_KEYS]
    if not twice:
        return None
    return RowError(Code.WRONG_FORMAT, f"the header has {_quoted(twice)} twice", expected="one column per key")


def parse_row(value: Any, form: Format) -> tuple[ChatExample, tuple[str, ...]]:
    """Convert a row to a chat example. Also return, for each message, the name of the field with its text.

    Args:
        form: the format of the file.

    Raises:
        RowError: the row is in a different format than the file, or it is not valid in that format. The
            error uses the field names of the file.
    """
    own, keys = recognise(value), _quoted(KEYS[form])
    if own is not None and own is not form:
        wrong = f"the row is in the format {own.value}, but the file is in the format {form.value}"
        raise RowError(Code.MIXED_FORMATS, wrong, expected=f"{keys} in every row")
    if not isinstance(value, dict):
        raise RowError(Code.WRONG_FORMAT, f"the line is {kind_of(value)}", expected=f"an object with {keys}")
    if missing := [key for key in KEYS[form] if key not in value]:
        wrong = f"the line has no {_quoted(missing)}, only {sorted(value)!r:.200}"
        raise RowError(Code.WRONG_FORMAT, wrong, expected=keys)
    for other in KEYS:
        if other is not form and other not in _OWN_KEYS and _has_keys(value, other):
            wrong = f"the line combines {keys} with {_quoted(KEYS[other])}"
            raise RowError(Code.MIXED_FORMATS, wrong, expected="one format per line")
    if form is Format.CHAT:
        return _read_chat(value)
    if form in _EVALS:
        return _own_fields(parse_example({"messages": _EVALS[form](value)}))
    chat = _Turns()
    _READERS[form](value, chat)
    try:
        example = parse_example({"messages": chat.turns, "tools": value.get("tools")})
    except RowError as error:
        raise error.at(chat.source_field(error.field)) from error
    return example, tuple(field for _, field in chat.fields)


def _has_keys(value: dict[str, Any], form: Format) -> bool:
    return all(value.get(key) is not None for key in KEYS[form])


def _own_fields(example: ChatExample) -> tuple[ChatExample, tuple[str, ...]]:
    """Return the example along with each message's field name in the chat format, such as `messages[1].content`."""
    return example, tuple(f"messages[{place}].content" for place in range(len(example.messages)))


def _read_chat(value: dict[str, Any]) -> tuple[ChatExample, tuple[str, ...]]:
    """Read turns that are already in the chat format. The system prompt may be a separate key, as in
    Anthropic's API.
    """
    system, turns = value.get("system"), value["messages"]
    if _absent(system) or not isinstance(turns, list):
        return _own_fields(parse_example(value))
    try:
        example = parse_example(value | {"messages": [{"role": "system", "content": system}, *turns]})
    except RowError as error:
        raise error.at(_PLACE.sub(_without_system, error.field)) from error
    return example, ("system", *_own_fields(example)[1][:-1])


def _without_system(place: re.Match[str]) -> str:
    """Return a field's name with the system turn left out of the count, so `messages[1].role` becomes
    `messages[0].role`.
    """
    number = int(place[1])
    return place[0].replace(f"[{number}]", f"[{number - 1}]", 1) if number else "system"


_EVALS: dict[Format, Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    Format.OPENAI_EVALS: turns_of_line,
    Format.OPENAI_EVALS_ITEM: turns_of_item,
    Format.OPENAI_EVALS_OUTPUT: turns_of_output,
}


def _read_alpaca(value: dict[str, Any], chat: _Turns) -> None:
    chat.add_system(value)
    history = (
        []
        if _absent(value.get("history"))
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
    if not _absent(context):
        expect(str, context, "input", "a string", Code.WRONG_CONTENT)
        if isinstance(instruction, str):
            instruction = f"{instruction}\n\n{context}" if instruction.strip() else context
    chat.add("user", instruction, "instruction")
    chat.add("assistant", value["output"], "output")


def _read_prompt_completion(value: dict[str, Any], chat: _Turns) -> None:
    """Read a prompt and a completion, given as two texts or, as in TRL, as two lists of turns."""
    chat.add_system(value)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if not isinstance(value[key], list):
            chat.add(role, value[key], key)
            continue
        for index, turn in enumerate(value[key]):
            place = f"{key}[{index}]"
            rest = dict(expect(dict, turn, place, "a turn"))
            chat.add(rest.pop("role", None), rest.pop("content", None), f"{place}.content", f"{place}.role", **rest)


def _read_sharegpt(value: dict[str, Any], chat: _Turns) -> None:
    turns = expect_turns(value["conversations"], "conversations")
    chat.add_system(value)
    for index, item in enumerate(turns):
        place = f"conversations[{index}]"
        turn = expect(dict, item, place, '{"from": ..., "value": ...}')
        key, text = ("from", "value") if turn.get("from") is not None or "role" not in turn else ("role", "content")
        speaker, content = turn.get(key), turn.get(text)
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            shown, expected = f"{speaker!r:.80}" if key in turn else "missing", f"one of {', '.join(_SHAREGPT_ROLES)}"
            raise RowError(Code.WRONG_ROLE, f"is {shown}", field=f"{place}.{key}", expected=expected)
        more: dict[str, Any] = {key: turn.get(key) for key in ("weight", "name", "reasoning_content")}
        if speaker in _CALLS:
            more["tool_calls"], content = _called(content, f"{place}.{text}"), None
        chat.add(_SHAREGPT_ROLES[speaker], content, f"{place}.{text}", f"{place}.{key}", **more)


def _read_xlam(value: dict[str, Any], chat: _Turns) -> None:
    """Read a question and the tool calls that answer it, both given as JSON text."""
    chat.add_system(value)
    chat.add("user", value["query"], "query")
    chat.add("assistant", None, "answers", tool_calls=_called(value["answers"], "answers"))


def _called(content: Any, field: str) -> list[dict[str, Any]]:
    """Return the tool calls in a turn whose text consists of calls.

    The text is a single call, `{"name": ..., "arguments": ...}`, or a list of them.
    """
    decoded = decode_inner(content) if isinstance(content, str) else content
    calls = decoded if isinstance(decoded, list) else [decoded]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        expected = '{"name": ..., "arguments": {...}} as JSON text'
        raise RowError(Code.WRONG_TOOLS, f"is {json_text(content):.80}", field=field, expected=expected)
    return [{"type": "function", "function": call} for call in calls]


def _absent(value: Any) -> bool:
    """Return whether an optional value is missing. CSV and Alpaca files use empty text for missing values."""
    return value is None or (isinstance(value, str) and not value.strip())


def _quoted(keys: Sequence[str]) -> str:
    return " and ".join(f"'{key}'" for key in keys)


_READERS: dict[Format, Callable[[dict[str, Any], _Turns], None]] = {
    Format.ALPACA: _read_alpaca,
    Format.PROMPT_COMPLETION: _read_prompt_completion,
    Format.SHAREGPT: _read_sharegpt,
    Format.XLAM: _read_xlam,
}
