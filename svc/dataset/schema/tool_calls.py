"""Parses an example's tool definitions and tool calls, which are in OpenAI's API format.

Arguments and definitions are stored as JSON text, which is hashable and survives a round trip unchanged.
Tools are never run.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.text.decode import decode_text

_MAX_DEPTH = 64
"""Maximum nesting depth of tool schemas and call arguments, which chat templates traverse recursively."""
Value = TypeVar("Value")
_FUNCTION = (None, "function")
"""Valid values for the `type` of a tool or a call. It may be omitted, because there is only one type."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call made by the assistant.

    Attributes:
        arguments: a JSON object as text, as in OpenAI's API.
        id: id by which the tool turn refers to the call, or None if the example does not give one.
        encoded_twice: whether the arguments in the file are double-encoded JSON.
    """

    name: str
    arguments: str
    id: str | None = None
    encoded_twice: bool = field(default=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the call in OpenAI's format."""
        identity = {} if self.id is None else {"id": self.id}
        return {**identity, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def answer_text(content: str, calls: Iterable[ToolCall]) -> str:
    """Return an answer and its tool calls as a single text: the content, followed by one line of JSON per call.

    The format is the same for all models and servers, and the arguments of each call are sorted. Arguments that are
    not valid JSON, for example because the call was cut off, are written as a string.
    """
    lines = [f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments": {_sorted(call)}}}' for call in calls]
    text = content.strip() if lines else content  # models write white space between their text and a call
    return "\n".join([text, *lines] if text else lines)


def _sorted(call: ToolCall) -> str:
    arguments = decode_inner(call.arguments or "{}")
    try:
        text = json.dumps(arguments, ensure_ascii=False, sort_keys=True, allow_nan=False)
        text.encode("utf-8")
    except ValueError:  # a lone surrogate escape, which UTF-8 cannot hold, or a number that overflows to infinity
        arguments = None
    return json.dumps(call.arguments, ensure_ascii=False) if arguments is None else text


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of an answer in OpenAI's format, including its tool calls. See `answer_text`."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [ToolCall(str(function["name"]), str(function.get("arguments") or "")) for function in functions]
    return answer_text(str(message.get("content") or ""), calls)


def split_calls(answer: str) -> tuple[str, list[tuple[str, Any]]]:
    """Split text written by `answer_text` into the content and the tool calls, each a pair of name and arguments."""
    lines, calls = answer.split("\n"), list[tuple[str, Any]]()
    while lines:
        call = decode_inner(lines[-1]) if lines[-1].startswith('{"name": "') else None
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            break
        calls.insert(0, (call["name"], call["arguments"]))
        lines.pop()
    return "\n".join(lines), calls


def calls_in(answer: str) -> list[tuple[str, Any]]:
    """Return an answer's tool calls as pairs of name and arguments."""
    return split_calls(answer)[1]


def parse_calls(where: str, role: str, calls: Any) -> tuple[ToolCall, ...]:
    """Parse the tool calls of one turn.

    Args:
        where: path of the turn, for example `messages[1]`.
        calls: the value of the turn's `tool_calls`.

    Raises:
        RowError: the calls are not in OpenAI's API format.
    """
    if calls is None or calls == []:
        return ()
    field = f"{where}.tool_calls"
    if role != "assistant":
        raise RowError(
            Code.WRONG_TOOLS, f"are in a {role} turn", field=field, expected="tool calls only in assistant turns"
        )
    expect(list, calls, field, "a list of calls", Code.WRONG_TOOLS)
    return tuple(_parse_call(f"{field}[{index}]", call) for index, call in enumerate(calls))


def _parse_call(field: str, call: Any) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not _is_named(function) or call.get("type") not in _FUNCTION:
        expected = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'
        raise RowError(Code.WRONG_TOOLS, f"is {json_text(call):.80}", field=field, expected=expected)
    arguments = "{}" if function.get("arguments") in (None, "") else function["arguments"]
    text = arguments if isinstance(arguments, str) else json_text(arguments)
    decoded = decode_inner(text)
    encoded_twice = isinstance(decoded, str)
    if encoded_twice:  # as in a line of a training file that OpenAI publishes
        text, decoded = decoded, decode_inner(decoded)
    if not isinstance(decoded, dict) or _is_too_deep(decoded):
        inner = f"{field}.function.arguments"
        raise RowError(Code.WRONG_TOOLS, f"is {text:.80}", field=inner, expected="a JSON object, as a string")
    name = function["name"]
    check_encodable(field, name + text + json_text(decoded))  # escapes in the text may hide half of a pair
    return ToolCall(name, text, optional_text(field, "id", call.get("id")), encoded_twice)


def parse_tools(tools: Any) -> tuple[str, ...]:
    """Return the tool definitions, each as JSON text.

    Args:
        tools: a list in OpenAI's format, either decoded or, as in some files, as JSON text.

    Raises:
        RowError: the value is not in this format.
    """
    if tools is None:
        return ()
    listed = tools
    if isinstance(tools, str):
        listed = decode_inner(tools) if tools.strip() else []
    if not isinstance(listed, list):
        raise RowError(
            Code.WRONG_TOOLS, f"is {json_text(tools):.80}", field="tools", expected="a list of tool definitions"
        )
    texts = tuple(_parse_tool(f"tools[{index}]", tool) for index, tool in enumerate(listed))
    first: dict[str, int] = {}
    for index, name in enumerate(names_of(texts)):
        if first.setdefault(name, index) != index:
            wrong = f"is a second tool named {name!r}"
            raise RowError(Code.WRONG_TOOLS, wrong, field=f"tools[{index}]", expected="a unique name for each tool")
    return texts


def names_of(tools: tuple[str, ...]) -> list[str]:
    """Return the names of the tools in definitions returned by `parse_tools`."""
    return [json.loads(tool)["function"]["name"] for tool in tools]


def _parse_tool(field: str, tool: Any) -> str:
    if isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str):
        tool = {"type": "function", "function": tool}  # only the definition, as in ShareGPT files
    function = tool.get("function") if isinstance(tool, dict) else None
    if (
        not isinstance(function, dict)
        or not _is_named(function)
        or not isinstance(function.get("parameters"), dict | None)
        or not isinstance(function.get("description"), str | None)
        or tool.get("type") not in _FUNCTION
        or _is_too_deep(tool)
    ):
        expected = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
        raise RowError(Code.WRONG_TOOLS, f"is {json_text(tool):.80}", field=field, expected=expected)
    text = json_text(tool)
    check_encodable(field, text)
    return text


def _is_named(function: dict[str, Any]) -> bool:
    name = function.get("name")
    return isinstance(name, str) and bool(name.strip())


def json_text(value: Any) -> str:
    """Return a value as JSON text, or only the name of its type if it is nested too deeply."""
    return kind_of(value) if _is_too_deep(value) else json.dumps(value, ensure_ascii=False)


def decode_inner(text: str) -> Any:
    """Decode JSON text that was stored as a string. Return None if the string is not strictly valid JSON."""
    try:
        return decode_text(text)
    except RowError:
        return None


def _is_too_deep(value: Any, levels: int = _MAX_DEPTH) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_is_too_deep(item, levels - 1) for item in inner)


def kind_of(value: Any) -> str:
    """Return the name of a JSON value's type for use in messages, such as "an object" or "a list"."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def expect(kind: type[Value], value: Any, field: str, expected: str, code: Code = Code.WRONG_FORMAT) -> Value:
    """Return the value if it has the expected type.

    Raises:
        RowError: the value has a different type.
    """
    if not isinstance(value, kind):
        raise RowError(code, f"is {kind_of(value)}", field=field, expected=expected)
    return value


def expect_turns(value: Any, field: str) -> list[Any]:
    """Return the value if it is a nonempty list of turns.

    Raises:
        RowError: the value is anything else.
    """
    if value == []:
        raise RowError(Code.WRONG_FORMAT, "is an empty list", field=field, expected="at least one turn")
    return expect(list, value, field, "a list of turns")


def check_encodable(field: str, text: str) -> None:
    """Raise RowError if a text contains an unpaired surrogate, which JSON can escape but UTF-8 cannot encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        wrong = "contains an unpaired surrogate"
        raise RowError(Code.WRONG_CONTENT, wrong, field=field, expected="text that can be encoded as UTF-8") from None


def optional_text(where: str, key: str, value: Any) -> str | None:
    """Return an optional string, or None if it is missing. An empty string counts as missing, as in Parquet and CSV.

    Raises:
        RowError: the value is not a string, or it cannot be encoded as UTF-8.
    """
    if value is None or value == "":
        return None
    field = f"{where}.{key}"
    check_encodable(field, expect(str, value, field, "a string if the key is present", Code.WRONG_CONTENT))
    return str(value)
