"""What of an engine's error may stand in a log or be kept: how it begins, and nothing that it quotes of a request.

vLLM's messages hold values of the request that they are about: after `value=` and `got`, in quotes, as lists and
objects of Python or JSON, and for a body of a wrong shape as pydantic's `'input'`. Who sent the request is told them;
who reads a log is not.
"""

import json
import re
from typing import Any

_CHARS = 200
_VALIDATION = re.compile(r"\d+ validation errors?:\s*\{'type': '(\w+)', 'loc': '(?:body\.)?(\w+)")
"""The kind of the first error, and the field of the request that it is in."""
_INTERVAL = r"-?\d+(?:\.\d+)?, ?-?\d+(?:\.\d+)?[\])]"
_VALUE = re.compile(
    r"(?<!\w)['\"`]"  # a quote, and no apostrophe
    r"|\{"
    rf"|\[(?!{_INTERVAL})"  # a list
    r"|\b(?:input|value)\b\s*[:=]"
    r"|(?:\bgot\b:?|=)\s*(?=[^\s\d.-])"
)


def without_values(message: str) -> str:
    """An engine's message up to the first value that it may quote, on one line."""
    if found := _VALIDATION.match(message):
        return f"validation error {found[1]} in {found[2]}"
    value = _VALUE.search(message)
    told = " ".join((message[: value.start()] if value else message).split())
    return f"{told[:_CHARS]}…" if value or len(told) > _CHARS else told


def error_of(body: bytes) -> Any:
    """What vLLM put under `error` in an answer; None where it is no JSON object."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return answer.get("error", answer) if isinstance(answer, dict) else None


def told_error(body: bytes) -> str:
    """The message of an answer that is an error, without values; empty where there is none."""
    error = error_of(body)
    message = error.get("message") if isinstance(error, dict) else error
    return without_values(message) if isinstance(message, str) else ""
