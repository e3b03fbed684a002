"""Prompts and answers as the GenAI conventions write them: messages with a role, each of typed parts.

Reads what the request log keeps, which is redacted: the prompt as JSON in its route's own form, the answer as text.
"""

import json
from typing import Any


def input_messages(prompt: str) -> str:
    """JSON of the messages of a prompt.

    Args:
        prompt: JSON of messages, or of the texts of plain completions.
    """
    turns = json.loads(prompt)
    turns = turns if isinstance(turns, list) else [turns]
    return _json([_message(turn) for turn in turns])


def output_messages(answer: str, finish_reason: str | None) -> str:
    """JSON of the one message of an answer; without parts where it has no text."""
    parts = [_text(answer)] if answer else []
    return _json([{"role": "assistant", "parts": parts, "finish_reason": finish_reason or "error"}])


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        return {"role": "user", "parts": [_text(str(turn))]}
    role = str(turn.get("role") or _role(turn))
    if "role" not in turn:  # an item of responses that is no message
        return {"role": role, "parts": [_part(turn)]}
    if role == "tool":
        return {"role": role, "parts": [_result(turn.get("tool_call_id"), turn.get("content"))]}
    content = turn.get("content")
    content = content if isinstance(content, list) else [content] if content is not None else []
    calls = turn.get("tool_calls")
    return {"role": role, "parts": [_part(one) for one in [*content, *(calls if isinstance(calls, list) else [])]]}


def _role(item: dict[str, Any]) -> str:
    return "tool" if str(item.get("type")).endswith("_output") else "assistant"


def _part(part: Any) -> dict[str, Any]:
    """A text, a call of a tool or its result; anything else as it came, which the conventions allow."""
    if not isinstance(part, dict):
        return _text(str(part))
    match part.get("type"):
        case "text" | "input_text" | "output_text":
            return _text(str(part.get("text") or ""))
        case "function" if isinstance(called := part.get("function"), dict):
            return _call(part.get("id"), called.get("name"), called.get("arguments"))
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
    """Without lone surrogates, for one of which a whole batch of spans could not be written."""
    return json.dumps(messages, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")
