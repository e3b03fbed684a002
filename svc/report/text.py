"""Untrusted texts for a page: limited in length, with invisible characters made visible."""

from typing import NamedTuple

LONGEST = 4_000
_PREVIEW = 280
_PREVIEW_LINES = 6


class CutText(NamedTuple):
    """A text as it is shown.

    Attributes:
        start: its beginning, where the rest is folded; else all of it.
        rest: empty where nothing is folded.
        left_out: characters that are not shown at all.
    """

    start: str
    rest: str
    left_out: int


def cut_text(text: str) -> CutText:
    """Return a short beginning of a text, and the rest up to a limit."""
    shown = visible(text[:LONGEST])
    start = "".join(shown.splitlines(keepends=True)[:_PREVIEW_LINES])[:_PREVIEW]
    left_out = max(0, len(text) - LONGEST)
    if len(shown) <= len(start) + _PREVIEW // 4 and "\n" not in shown[len(start) :].strip() and not left_out:
        return CutText(shown, "", 0)
    return CutText(start, shown[len(start) :], left_out)


def visible(text: str) -> str:
    """Return a text with Unicode's pictures of control characters, some of which HTML must not contain."""
    return text.translate(_PICTURES)


_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD) | dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
