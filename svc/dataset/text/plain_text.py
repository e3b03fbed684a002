"""Checks whether a text is blank, and whether two texts look the same to a reader.

This module knows nothing about examples.
"""

import re
import unicodedata

_INVISIBLE = {"Zs", "Zl", "Zp", "Cc", "Cf"}
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"
"""Characters without a visible glyph that Unicode classifies as letters or symbols: Hangul fillers and the
blank Braille pattern."""
_UNIFIED = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys((0xAD, 0x200B, 0x2060, 0xFEFF))
"""Translation table that maps full-width characters to ASCII and removes soft hyphens and zero-width spaces.

The joiners U+200C and U+200D are kept, because they change the meaning of words in Persian and Hindi and
of emoji. NFKC is not applied, because it would turn 5² into 52."""
_TO_UNIFY = re.compile("[\uff01-\uff5e\u00ad\u200b\u2060\ufeff]")


def is_blank(text: str) -> bool:
    """Return whether a text has no visible characters."""
    if "!" <= text[:1] <= "~":
        return False  # nearly every text, in a tenth of the time
    return not any(unicodedata.category(letter) not in _INVISIBLE and letter not in _FILLERS for letter in text)


def unified(text: str) -> str:
    """Normalize a text so that case, Unicode composition and invisible characters make no difference."""
    if text.isascii():
        return text.lower()
    if _TO_UNIFY.search(text):
        text = text.translate(_UNIFIED)
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def normal(text: str) -> str:
    """Normalize a text as `unified` does, and collapse its whitespace."""
    return " ".join(unified(text).split())
