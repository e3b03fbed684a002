"""Handles server-sent events as bytes: splits a stream into events, and reads an event's name and data.

Events are forwarded unchanged, and parsed only if they can contain a field of interest. Searching for a key's bytes is
reliable, because quotes inside JSON strings are always escaped: a model cannot generate `"error":` unescaped.
This module does not know what a route's events mean; see serving.protocols.wire_formats.
"""

import json
import re
from typing import Any

_BLANK_LINE = re.compile(rb"(?:\r\n|\n){2}")


class EventSplitter:
    """Splits a byte stream into server-sent events. The chunks it receives may end anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Add a chunk of the stream, and return the events that are now complete, each including its blank line.

        Concatenating all returned events reproduces the stream.
        """
        if not self._rest and chunk.find(b"\n\n") == len(chunk) - 2 >= 0 and b"\r" not in chunk:
            return [chunk]  # the usual case
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


def is_event(part: bytes) -> bool:
    """Return whether a part of an answer is a server-sent event rather than a JSON body."""
    return not part.startswith(b"{")


def name_of(event: bytes) -> str:
    """Return the name of an event, or an empty string if it has none."""
    return _lines(event, b"event:").decode("utf-8", "replace")


def data_of(event: bytes) -> bytes:
    """Return the data of an event, or empty bytes for a comment."""
    return _lines(event, b"data:")


def _lines(event: bytes, field: bytes) -> bytes:
    lines = (line for line in event.splitlines() if line.startswith(field))
    return b"\n".join(line[len(field) :].removeprefix(b" ") for line in lines)


def json_of(part: bytes) -> dict[str, Any]:
    """Return the JSON object in an event or body, or an empty object if there is none, as in a comment or `[DONE]`."""
    try:
        value = json.loads(data_of(part) if is_event(part) else part)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def find_error(event: bytes) -> Any | None:
    """Return the top-level `error` of an event, or None if the event is not an error."""
    return json_of(event).get("error") if b'"error"' in event else None
