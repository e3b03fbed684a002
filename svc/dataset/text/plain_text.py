"""What of a text counts: whether it shows anything, and when two texts are the same to a reader.

Knows nothing of examples.
"""

import re
import unicodedata

_INVISIBLE = {"Zs", "Zl", "Zp", "Cc", "Cf"}
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and symbols by category, but without a glyph: Hangul fillers and the blank Braille pattern."""
_UNIFIED = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys((0xAD, 0x200B, 0x2060, 0xFEFF))
"""Full-width letters are ASCII; hyphens that only show at a line's end and spaces without a width are nothing.

Not so the joiners U+200C and U+200D, which change a word in Persian and Hindi and an emoji; nor all of NFKC, under
which 5² would be 52.
"""
_TO_UNIFY = re.compile("[\uff01-\uff5e\u00ad\u200b\u2060\ufeff]")


def is_blank(text: str) -> bool:
    """Whether a text has no character that can be seen."""
    if "!" <= text[:1] <= "~":
        return False  # nearly every text, in a tenth of the time
    return not any(unicodedata.category(letter) not in _INVISIBLE and letter not in _FILLERS for letter in text)


def unified(text: str) -> str:
    """A text in one way of writing it: without regard to case, to composed letters and to what cannot be seen."""
    if text.isascii():
        return text.lower()
    if _TO_UNIFY.search(text):
        text = text.translate(_UNIFIED)
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def normal(text: str) -> str:
    """The same, without regard to spacing either."""
    return " ".join(unified(text).split())
