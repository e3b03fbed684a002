"""Removes request content from engine errors before they are logged or stored, cutting at the first value.

vLLM's messages contain values from the request: after `value=` and `got`, in quotes, as Python or JSON
lists and objects, and, for an invalid body, as pydantic's `'input'`. The sender of the request gets
these values; readers of a log do not.
"""

import json
import re
from typing import Any

_CHARS = 200
_VALIDATION = re.compile(r"\d+ validation errors?:\s*\{'type': '(\w+)', 'loc': '(?:body\.)?(\w+)")
"""Matches the type of the first validation error and the request field."""
_INTERVAL = r"-?\d+(?:\.\d+)?, ?-?\d+(?:\.\d+)?[\])]"
_VALUE = re.compile(
    r"(?<!\w)['\"`]"  # a quote, not an apostrophe
    r"|\{"
    rf"|\[(?!{_INTERVAL})"  # a list
    r"|\b(?:input|value)\b\s*[:=]"
    r"|(?:\bgot\b:?|=)\s*(?=[^\s\d.-])"
)


def without_values(message: str) -> str:
    """Return an engine's message on one line, cut off before the first value that it may quote."""
    if match := _VALIDATION.match(message):
        return f"validation error {match[1]} in {match[2]}"
    value = _VALUE.search(message)
    safe = " ".join((message[: value.start()] if value else message).split())
    return f"{safe[:_CHARS]}…" if value or len(safe) > _CHARS else safe


def error_of(body: bytes) -> Any:
    """Return `error` from vLLM's response, or the whole object if it has no such field.

    The result is None if the body is not a JSON object.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return answer.get("error", answer) if isinstance(answer, dict) else None


def told_error(body: bytes) -> str:
    """Return the message of an error response without the request's values, or "" if there is none."""
    error = error_of(body)
    message = error.get("message") if isinstance(error, dict) else error
    return without_values(message) if isinstance(message, str) else ""
