"""Strict JSON decoding: UTF-8 only, no NaN and no duplicate keys."""

import json
from collections import Counter
from typing import Any

from svc.dataset.problem.problem import Code, RowError


def not_utf8(error: UnicodeDecodeError, place: str = "") -> RowError:
    """Return the error for bytes that are not valid UTF-8."""
    wrong = f"byte 0x{error.object[error.start]:02x}{place} is not valid UTF-8"
    return RowError(Code.NOT_UTF8, wrong, expected="UTF-8 text")


def decode(raw: bytes) -> Any:
    """Decode bytes as one JSON value.

    Raises:
        RowError: the bytes are not valid UTF-8 or not valid JSON.
    """
    try:
        return decode_text(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(error, f" at position {error.start}") from error


def decode_text(text: str) -> Any:
    """Decode text as one JSON value.

    Raises:
        RowError: the text is not valid JSON.
    """
    try:
        return STRICT.decode(text)
    except (ValueError, RecursionError) as error:
        raise explain(error) from error


def explain(error: ValueError | RecursionError) -> RowError:
    """Convert a JSON parser error to a RowError that explains it."""
    if isinstance(error, json.JSONDecodeError):
        wrong = f"invalid JSON: {error.msg} at column {error.colno}"
    elif isinstance(error, RecursionError):
        wrong = "cannot parse the JSON: it is nested too deeply"
    else:  # Python rejects integers of more than 4300 digits
        wrong = "cannot parse the JSON: it contains a number with too many digits"
    return RowError(Code.NOT_JSON, wrong, expected="one JSON object per line")


def _refuse_constant(name: str) -> Any:
    raise RowError(Code.NOT_JSON, f"invalid JSON: {name}", expected="a finite number, as JSON has no NaN or Infinity")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = min(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowError(Code.NOT_JSON, f"duplicate key {twice!r} in one object", expected="unique keys")
    return value


STRICT = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
"""Decoder that raises RowError for NaN, Infinity and duplicate keys."""
