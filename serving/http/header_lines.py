"""Headers of an answer as the lines that are sent, each with its end: all of one answer are put together at once.

Whoever makes them answers for their values: they come from here, or were checked, and hold no end of a line.
"""

Header = tuple[bytes, bytes]
HeaderLines = bytes
"""As `b"content-type: application/json\\r\\n"`; of any number of headers."""


def header_line(header: Header) -> HeaderLines:
    """The line of one header."""
    return b"%b: %b\r\n" % header


def headers_in(lines: HeaderLines) -> list[Header]:
    """The headers in lines, as ASGI has them."""
    found = []
    for line in lines.splitlines():
        name, _, value = line.partition(b": ")
        found.append((name, value))
    return found
