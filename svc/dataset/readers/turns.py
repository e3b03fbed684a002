"""Collects the turns of a row in any format, and converts them to a chat example.

Error messages name the fields of the file, not the fields of the collected turns.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.schema.example import ChatExample, parse_example
from svc.dataset.schema.tool_calls import decode_inner, expect, json_text

_CALLS = ("function_call", "tool_call")
ASSISTANTS = ("gpt", "assistant", "model", "chatgpt", "bing", "bard", *_CALLS)
"""All names that the formats use for the assistant role."""
_SPEAKERS = {
    "system": ("system",),
    "user": ("human", "user"),
    "assistant": ASSISTANTS,
    "tool": ("tool", "function_response", "observation"),
}
ROLES = {speaker: role for role, speakers in _SPEAKERS.items() for speaker in speakers}
"""Maps each role name used by any format to the role in the chat format."""
_PLACE = re.compile(r"messages\[(\d+)\](?:\.(\w+))?")


@dataclass(frozen=True, slots=True)
class Turns:
    """Chat turns, and the names of the fields from which each turn's role and content were read."""

    turns: list[dict[str, Any]] = field(default_factory=list)
    fields: list[tuple[str, str]] = field(default_factory=list)

    def add(self, role: Any, content: Any, place: str, role_place: str = "", **more: Any) -> None:
        """Add a turn.

        Args:
            place: name of the field that contains the content.
            role_place: name of the field that contains the role, if different from `place`.
        """
        self.turns.append({"role": role, "content": content, **more})
        self.fields.append((role_place or place, place))

    def add_system(self, value: dict[str, Any]) -> None:
        """Add the system prompt if the row stores one separately from its turns."""
        if not is_absent(value.get("system")):
            self.add("system", value["system"], "system")

    def add_chat(self, item: Any, place: str) -> None:
        """Add a turn given as `{"role": ..., "content": ...}`.

        Raises:
            RowError: the turn is not an object.
        """
        rest = dict(expect(dict, item, place, "a turn"))
        self.add(rest.pop("role", None), rest.pop("content", None), f"{place}.content", f"{place}.role", **rest)

    def add_sharegpt(self, item: Any, place: str) -> None:
        """Add a turn given as `{"from": ..., "value": ...}`.

        Raises:
            RowError: the turn is not in this form.
        """
        turn = expect(dict, item, place, '{"from": ..., "value": ...}')
        key, text = ("from", "value") if turn.get("from") is not None or "role" not in turn else ("role", "content")
        speaker, content = turn.get(key), turn.get(text)
        if not isinstance(speaker, str) or speaker not in ROLES:
            shown, expected = f"{speaker!r:.80}" if key in turn else "missing", f"one of {', '.join(ROLES)}"
            raise RowError(Code.WRONG_ROLE, f"is {shown}", field=f"{place}.{key}", expected=expected)
        more: dict[str, Any] = {key: turn.get(key) for key in ("weight", "name", "reasoning_content")}
        if speaker in _CALLS:
            more["tool_calls"], content = parse_called(content, f"{place}.{text}"), None
        self.add(ROLES[speaker], content, f"{place}.{text}", f"{place}.{key}", **more)

    def parse(self, tools: Any) -> tuple[ChatExample, tuple[str, ...]]:
        """Return the turns as an example and, for each message, the name of the field that contains its text.

        Args:
            tools: tool definitions of the row.

        Raises:
            RowError: the turns are not a valid example. The error uses the field names of the file.
        """
        try:
            example = parse_example({"messages": self.turns, "tools": tools})
        except RowError as error:
            raise error.at(self._source_field(error.field)) from error
        return example, tuple(field for _, field in self.fields)

    def _source_field(self, name: str) -> str:
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


def parse_called(content: Any, field: str) -> list[dict[str, Any]]:
    """Return the tool calls in a turn whose text consists of calls.

    The text is a single call, `{"name": ..., "arguments": ...}`, or a list of them.

    Raises:
        RowError: the text is anything else.
    """
    decoded = decode_inner(content) if isinstance(content, str) else content
    calls = decoded if isinstance(decoded, list) else [decoded]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        expected = '{"name": ..., "arguments": {...}} as JSON text'
        raise RowError(Code.WRONG_TOOLS, f"is {json_text(content):.80}", field=field, expected=expected)
    return [{"type": "function", "function": call} for call in calls]


def is_absent(value: Any) -> bool:
    """Return whether an optional value is missing. CSV and Alpaca files use empty text for missing values."""
    return value is None or (isinstance(value, str) and not value.strip())
