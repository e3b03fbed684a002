"""Converts prompts and answers to the format of the GenAI conventions, in which messages have a role and typed parts.

The input is redacted content from the request log: the prompt as JSON in its route's format, and the answer
as text.
"""

import json
from typing import Any

from svc.dataset.schema.tool_calls import split_calls


def input_messages(prompt: str) -> str:
    """Return a prompt's messages as JSON.

    Args:
        prompt: JSON of chat messages, or of a plain completion's prompt.
    """
    turns = json.loads(prompt)
    turns = turns if isinstance(turns, list) else [turns]
    return _json([_message(turn) for turn in turns])


def output_messages(answer: str, finish_reason: str | None) -> str:
    """Return a JSON list that contains the answer as its only message.

    If the answer is empty, the message has no parts.
    """
    text, calls = split_calls(answer)
    parts = [*([_text(text)] if text else []), *(_call(None, name, arguments) for name, arguments in calls)]
    return _json([{"role": "assistant", "parts": parts, "finish_reason": finish_reason or "error"}])


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        return {"role": "user", "parts": [_text(str(turn))]}
    role = str(turn.get("role") or _role(turn))
    if "role" not in turn:  # an item of responses that is not a message
        return {"role": role, "parts": [_part(turn)]}
    if role == "tool":
        return {"role": role, "parts": [_result(turn.get("tool_call_id"), turn.get("content"))]}
    content = turn.get("content")
    content = content if isinstance(content, list) else [content] if content is not None else []
    calls = turn.get("tool_calls")
    return {"role": role, "parts": [_part(part) for part in [*content, *(calls if isinstance(calls, list) else [])]]}


def _role(item: dict[str, Any]) -> str:
    return "tool" if str(item.get("type")).endswith("_output") else "assistant"


def _part(part: Any) -> dict[str, Any]:
    """Return a message part in the format of the GenAI conventions.

    Texts, tool calls and tool results are converted. Other parts are returned unchanged.
    """
    if not isinstance(part, dict):
        return _text(str(part))
    match part.get("type"):
        case "text" | "input_text" | "output_text":
            return _text(str(part.get("text") or ""))
        case "function" if isinstance(function := part.get("function"), dict):
            return _call(part.get("id"), function.get("name"), function.get("arguments"))
        case "function_call":
            return _call(part.get("call_id"), part.get("name"), part.get("arguments"))
        case "tool_use":
            return _call(part.get("id"), part.get("name"), part.get("input"))
        case "function_call_output":
            return _result(part.get("call_id"), part.get("output"))
        case "tool_result":
            return _result(part.get("tool_use_id"), part.get("content"))
    return {**part, "type": str(part.get("type") or "unknown")}


def _text(content: str) -> dict[str, Any]:
    return {"type": "text", "content": content}


def _call(id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_call", "id": id, "name": str(name or ""), "arguments": arguments}


def _result(id: Any, response: Any) -> dict[str, Any]:
    return {"type": "tool_call_response", "id": id, "response": response}


def _json(messages: list[dict[str, Any]]) -> str:
    """Return the messages as JSON without lone surrogates, because a single surrogate would make a whole batch of spans
    fail.
    """
    return json.dumps(messages, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")
