"""Whether reading a request body would hold the event loop for too long, estimated from its raw bytes.

Reading a body means parsing it, checking its fields and writing it out again for the engine. The event loop can do
nothing else meanwhile, and a thread would not help: the parser holds the interpreter's lock. Size alone is no measure:
4 MiB of text take 5 ms, 4 MiB of `{},{},{}` half a second.
"""

_BYTE_NS = 3.0
_ESCAPE_NS = 18.0
_VALUE_NS = 110.0
_CONTAINER_NS = 900.0
"""For a byte, a backslash, a value, and an object or array: up to half as much more as measured on a Xeon with AMX,
since others are slower."""
_FLOAT_NS = 250.0
"""For a number with a point or an exponent, beside its value."""
_DENSEST = 2
"""Bytes of the smallest object or array: `[]`."""
_LONGEST_NUMBER = 24
"""Digits. Python converts a number in a time that grows with their square: 1,000 numbers of 4,000 took 0.26 s."""
_FEW_NUMBERS = 128 * 1024
"""Bytes. 128 KiB of the slowest numbers take 9 ms."""
_MOST_STRINGS = 65_536
"""Removing more strings than this would itself take too long."""
_SLICE = 128 * 1024
_SEPARATORS = b",:[{"
_ALL_ELSE = bytes(set(range(256)) - set(_SEPARATORS))
_NUMBERS = bytes.maketrans(b"0123456789E", b"1111111111e")


def takes_longer(body: bytes, most_ms: float) -> bool:
    """Return whether reading a body may take longer than that, or it has a number that is too long.

    Separators and digits inside of strings mean nothing: a text may have as many as it likes. Strings are taken out
    where that is quick; otherwise their contents count.
    """
    left_ns = most_ms * 1e6 - len(body) * _BYTE_NS
    if left_ns >= len(body) / _DENSEST * (_CONTAINER_NS + 2 * _VALUE_NS):
        return False  # as most are: whatever it is made of
    backslashes = body.count(b"\\")
    left_ns -= backslashes * _ESCAPE_NS
    if backslashes:
        if not _exceeds(body, left_ns):
            return False
        if left_ns < most_ms * 1e6 / 2:
            return True
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if body.count(b'"') <= 2 * _MOST_STRINGS:
        body = b"".join(body.split(b'"')[::2])
    return _exceeds(body, left_ns)


def _exceeds(text: bytes, left_ns: float) -> bool:
    for start in range(0, len(text), _SLICE):
        separators = text[start : start + _SLICE].translate(None, _ALL_ELSE)
        containers = separators.count(b"{") + separators.count(b"[")
        left_ns -= (len(separators) + containers) * _VALUE_NS + containers * _CONTAINER_NS
        if left_ns < 0:
            return True
    if len(text) <= _FEW_NUMBERS:
        return False
    numbers = text.translate(_NUMBERS)
    if b"1" * _LONGEST_NUMBER in numbers:
        return True
    return (numbers.count(b"1e") + numbers.count(b"1.")) * _FLOAT_NS > left_ns
