"""Removes request content from engine error messages before they are logged or stored.

vLLM's messages quote values from the request in several forms: after `value=` or `got`, in quotation marks, as Python
or JSON lists and objects, or, if the body is invalid, as pydantic's `'input'`. A message is therefore cut off at the
first value. The sender of the request gets the full message, but readers of a log do not.
"""

import json
import re
from typing import Any

_CHARS = 200
_VALIDATION = re.compile(r"\d+ validation errors?:\s*\{'type': '(\w+)', 'loc': '(?:body\.)?(\w+)")
"""Matches the type and the request field of the first validation error."""
_INTERVAL = r"-?\d+(?:\.\d+)?, ?-?\d+(?:\.\d+)?[\])]"
_VALUE = re.compile(
    r"(?<!\w)['\"`]"  # a quote, not an apostrophe
    r"|\{"
    rf"|\[(?!{_INTERVAL})"  # a list
    r"|\b(?:input|value)\b\s*[:=]"
    r"|(?:\bgot\b:?|=)\s*(?=[^\s\d.-])"
)


def without_values(message: str) -> str:
    """Return an engine's error message on one line, cut off before the first value that may come from the request."""
    if match := _VALIDATION.match(message):
        return f"validation error {match[1]} in {match[2]}"
    value = _VALUE.search(message)
    safe = " ".join((message[: value.start()] if value else message).split())
    return f"{safe[:_CHARS]}…" if value or len(safe) > _CHARS else safe


def error_of(body: bytes) -> Any:
    """Return the `error` field of a vLLM response, or the whole response if it has no such field.

    The result is None if the body is not a JSON object.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return answer.get("error", answer) if isinstance(answer, dict) else None


def error_message(body: bytes) -> str:
    """Return an error response's message, stripped of values from the request.

    The result is empty if the response contains no message.
    """
    error = error_of(body)
    message = error.get("message") if isinstance(error, dict) else error
    return without_values(message) if isinstance(message, str) else ""
