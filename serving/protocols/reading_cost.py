"""Estimates from a request body's raw bytes whether reading it would block the event loop for too long.

Reading a body means parsing it, checking its fields and serializing it again for the engine. This blocks the event
loop, and a thread would not help, because the parser holds Python's global interpreter lock. Size alone does not
predict the time: 4 MiB of text take 5 ms, but 4 MiB of `{},{},{}` take half a second.
"""

import re

_BYTE_NS = 3.0
_ESCAPE_NS = 18.0
_VALUE_NS = 100.0
_CONTAINER_NS = 900.0
"""Estimated times for reading a byte, a backslash, a value, and an object or array, in nanoseconds. They are up to
50% higher than those measured on a Xeon with AMX, since other machines are slower."""
_FLOAT_NS = 250.0
"""Time, in addition to `_VALUE_NS`, for reading a number with a decimal point or an exponent, in nanoseconds."""
_MIN_CONTAINER_BYTES = 2
"""Size of the smallest object or array, `[]`, in bytes."""
_MAX_DIGITS = 24
"""A number with this many digits or more is rejected. Conversion time grows with the square of the number of digits:
1,000 numbers of 4,000 digits took 0.26 s."""
_FEW_NUMBERS = 128 * 1024
"""Size of a body, in bytes, up to which its numbers are not examined, because reading 128 KiB of numbers takes at most
9 ms."""
_STRING_NS = 40.0
"""Time, in addition to `_BYTE_NS` for each byte, for reading one JSON string, in nanoseconds."""
_SLICE = 64 * 1024
_BACKSLASHES = re.compile(rb"\\*")
_SEPARATORS = b",:[{"
_ALL_ELSE = bytes(set(range(256)) - set(_SEPARATORS))
_NUMBERS = bytes.maketrans(b"0123456789E", b"1111111111e")


def takes_longer(body: bytes, most_ms: float) -> bool:
    """Return whether the estimated time for reading a body exceeds `most_ms`, or a number in it has too many digits.

    Separators and digits inside strings are ignored. The body is scanned in slices until the estimated time exceeds
    the limit.
    """
    left_ns = most_ms * 1e6 - len(body) * _BYTE_NS
    if left_ns >= len(body) / _MIN_CONTAINER_BYTES * (_CONTAINER_NS + 2 * _VALUE_NS):
        return False  # the usual case: fast enough whatever the body contains
    start, in_string, few_numbers = 0, 0, len(body) <= _FEW_NUMBERS
    while start < len(body) and left_ns >= 0:
        end = start + _SLICE
        if body[end - 1 : end] == b"\\":  # do not split an escape
            end = _end_of_backslashes(body, end) + 1
        part, start = body[start:end], end
        if escapes := part.count(b"\\"):
            left_ns -= escapes * _ESCAPE_NS
            part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = part.split(b'"')
        outside = b"".join(pieces[in_string::2])
        in_string ^= (len(pieces) - 1) & 1
        left_ns -= len(pieces) * _STRING_NS / 2 + _structure_ns(outside)
        if not few_numbers and outside:
            numbers = outside.translate(_NUMBERS)
            left_ns -= (numbers.count(b"1e") + numbers.count(b"1.")) * _FLOAT_NS
            if b"1" * _MAX_DIGITS in numbers:
                return True
    return left_ns < 0


def _end_of_backslashes(body: bytes, start: int) -> int:
    backslashes = _BACKSLASHES.match(body, start)
    return backslashes.end() if backslashes else start


def _structure_ns(text: bytes) -> float:
    separators = text.translate(None, _ALL_ELSE)
    containers = separators.count(b"{") + separators.count(b"[")
    return (len(separators) + containers) * _VALUE_NS + containers * _CONTAINER_NS
