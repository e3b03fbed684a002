"""Server-sent events as bytes: where one ends, and the few things that the gateway looks for in it.

Events pass untouched; only those that can hold what is looked for are parsed. The quick tests are exact, because a
quote inside a JSON string is always escaped: a model cannot write the bytes of a key, as `"usage":`.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

_BLANK_LINE = re.compile(rb"(?:\r\n|\n){2}")
_USAGE = re.compile(rb'"usage"\s*:\s*(\{(?:[^{}]|\{[^{}]*\})*\})')
_FINISH_REASON = re.compile(rb'"finish_reason"\s*:\s*"([a-z_]{1,40})"')
DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer."""

    prompt: int
    completion: int


def find_usage(body: bytes) -> Usage | None:
    """The last `usage` object in a JSON text, without parsing all of it: log-probabilities make megabytes."""
    found = _USAGE.findall(body)
    if not found:
        return None
    try:
        usage = json.loads(found[-1])
        return Usage(int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0))
    except (ValueError, KeyError, TypeError):
        return None


def find_finish_reason(body: bytes) -> str | None:
    """The first `finish_reason` that is set, in a JSON text or an event."""
    found = _FINISH_REASON.search(body) if b'"finish_reason"' in body else None
    return found[1].decode("ascii") if found else None


class EventSplitter:
    """Cuts a byte stream into events; chunks may end anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that are complete now, each with its blank line: joined, they are the stream."""
        data = self._rest + chunk if self._rest else chunk
        # A blank line can begin up to three bytes before the new chunk.
        ends = _BLANK_LINE.finditer(data, max(0, len(self._rest) - 3))
        events: list[bytes] = []
        start = 0
        for end in ends:
            events.append(data[start : end.end()])
            start = end.end()
        self._rest = data[start:]
        return events

    @property
    def rest(self) -> bytes:
        """What came after the last complete event."""
        return self._rest


def data_of(event: bytes) -> bytes:
    """The data of an event; empty for a comment."""
    lines = (line for line in event.splitlines() if line.startswith(b"data:"))
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines)


def is_done(event: bytes) -> bool:
    """The event that ends a complete answer."""
    return DONE in event and data_of(event).strip() == DONE


def is_token(event: bytes) -> bool:
    """The event brings generated tokens: neither a comment nor the chunk that only opens a chat message."""
    return event.startswith(b"data:") and b'"role":' not in event


def is_usage_only(event: bytes) -> bool:
    """The chunk that holds token counts and no choices."""
    if b'"usage"' not in event:
        return False
    chunk = _json_of(event)
    return chunk.get("choices") == [] and chunk.get("usage") is not None


def find_error(event: bytes) -> Any | None:
    """What stands under `error` at the top of an event; None when it is no error."""
    return _json_of(event).get("error") if b'"error"' in event else None


def _json_of(event: bytes) -> dict[str, Any]:
    try:
        chunk = json.loads(data_of(event))
    except ValueError:
        return {}
    return chunk if isinstance(chunk, dict) else {}
