"""Prepares untrusted text for a page: limits its length and makes invisible characters visible."""

from typing import NamedTuple

LONGEST = 4_000
_PREVIEW = 280
_PREVIEW_LINES = 6


class CutText(NamedTuple):
    """A text, split for display.

    Attributes:
        start: the part that is always visible: the beginning of a long text, otherwise the whole text.
        rest: the part that is initially collapsed; empty if `start` is the whole text.
        left_out: number of characters that are not on the page.
    """

    start: str
    rest: str
    left_out: int


def cut_text(text: str) -> CutText:
    """Split the text into the part that is always visible and the part that is initially collapsed.

    Everything after the 4,000th character is left out.
    """
    shown = visible(text[:LONGEST])
    start = "".join(shown.splitlines(keepends=True)[:_PREVIEW_LINES])[:_PREVIEW]
    left_out = max(0, len(text) - LONGEST)
    if len(shown) <= len(start) + _PREVIEW // 4 and "\n" not in shown[len(start) :].strip() and not left_out:
        return CutText(shown, "", 0)
    return CutText(start, shown[len(start) :], left_out)


def visible(text: str) -> str:
    """Return the text with visible symbols in place of control characters, some of which HTML must not contain."""
    return text.translate(_PICTURES)


_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD) | dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
