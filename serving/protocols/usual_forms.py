"""The common forms of messages, input items and tools. An element that matches one of them is valid for vLLM too.

An element that matches none of them may still be valid, which is for vLLM to decide. Each form has a
subset of the fields and types that vLLM allows; tests/e2e/test_worst_requests.py compares the forms with
vLLM. msgspec checks them in C.
"""

from typing import Annotated, Any, Literal

import msgspec

_Nothing = Annotated[list[Any], msgspec.Meta(max_length=0)]
_Status = Literal["in_progress", "completed", "incomplete"]


class _Form(msgspec.Struct, forbid_unknown_fields=True):
    """Base class for the common forms of messages, input items and tools. Fields that a form does not define are
    rejected.
    """


class _ChatMessage(_Form, tag_field="role"):
    content: str | list[Any]
    name: str = ""


class _System(_ChatMessage, tag="system"): ...


class _Developer(_ChatMessage, tag="developer"): ...


class _User(_ChatMessage, tag="user"): ...


class _ToolAnswer(_Form, tag_field="role", tag="tool"):
    content: str | list[Any]
    tool_call_id: str
    name: str = ""


class _Assistant(_Form, tag_field="role", tag="assistant"):
    content: str | list[Any] | None = None
    name: str = ""
    tool_calls: list[Any] = []
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    annotations: _Nothing | None = None
    audio: None = None
    function_call: None = None


class _OneChatMessage(msgspec.Struct):
    """A struct that wraps a single chat message.

    msgspec caches its analysis of structs, but analyzes a union anew each time, which takes 10 us.
    """

    element: _System | _Developer | _User | _ToolAnswer | _Assistant


class _InputText(_Form, tag_field="type", tag="input_text"):
    text: str


class _InputMessage(_Form):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[_InputText]
    type: Literal["message"] = "message"


class _OutputText(_Form, tag_field="type", tag="output_text"):
    text: str
    annotations: _Nothing = []
    logprobs: _Nothing | None = None


class _RefusalText(_Form, tag_field="type", tag="refusal"):
    refusal: str


class _OutputMessage(_Form):
    role: Literal["assistant"]
    content: list[_OutputText | _RefusalText]
    type: Literal["message"]
    id: str = ""
    status: _Status = "completed"
    phase: None = None


class _FunctionCall(_Form, tag_field="type", tag="function_call"):
    arguments: str
    call_id: str
    name: str
    id: str | None = None
    namespace: str | None = None
    status: _Status | None = None


class _FunctionCallOutput(_Form, tag_field="type", tag="function_call_output"):
    call_id: str
    output: str
    id: str | None = None
    status: _Status | None = None


class _SummaryText(_Form, tag_field="type", tag="summary_text"):
    text: str


class _ReasoningText(_Form, tag_field="type", tag="reasoning_text"):
    text: str


class _Reasoning(_Form, tag_field="type", tag="reasoning"):
    summary: list[_SummaryText]
    id: str = ""
    content: list[_ReasoningText] | None = None
    encrypted_content: str | None = None
    status: _Status | None = None


class _OneItem(msgspec.Struct):
    element: _FunctionCall | _FunctionCallOutput | _Reasoning


class _FunctionTool(_Form, tag_field="type", tag="function"):
    name: str
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


def is_usual_message(message: Any) -> bool:
    """Return whether a chat-completions message has one of the forms that are known to be valid for vLLM."""
    return _fits({"element": message}, _OneChatMessage)


def is_usual_item(item: Any) -> bool:
    """Return whether an input item for /v1/responses has one of the forms that are known to be valid for vLLM."""
    if not isinstance(item, dict):
        return False
    if item.get("type", "message") != "message":
        return _fits({"element": item}, _OneItem)
    return _fits(item, _InputMessage) or _fits(item, _OutputMessage)


def is_usual_tool(tool: Any) -> bool:
    """Return whether a tool for /v1/responses is an ordinary function."""
    return _fits(tool, _FunctionTool)


def _fits(value: Any, form: Any) -> bool:
    try:
        msgspec.convert(value, form)
    except msgspec.ValidationError:
        return False
    return True
