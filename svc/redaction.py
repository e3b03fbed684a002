"""Blanks what must not be kept in prompts and answers: mail addresses, phone and card numbers, and own patterns.

It does what patterns can: a number that only looks like a phone number is lost from the record, never from the answer,
and one that is written in an unusual way stays. Names and places have no pattern. Who must keep all of that out keeps
no content.

Every pattern here runs in linear time, because clients choose the text; own patterns are their owner's care.
"""

import re
from collections.abc import Sequence
from typing import Any

_GAP = " \u00a0\u202f\u2010\u2011-"  # spaces and hyphens, those that do not break a line among them
_MAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w-]{1,63}\.)+\w{2,63}")
_CARD = re.compile(rf"(?<!\d)(?:\d{{4}}(?:\.\d{{4}}){{3}}|\d(?:[{_GAP}]?\d){{12,18}})(?!\d)")
# Seven to fifteen digits (E.164). What keeps dates, versions, sizes and IP addresses out is how it begins: with + or
# 0, or grouped as in North America.
_PHONE = re.compile(
    rf"(?<![\w.])(?:(?:\+|00?)[({_GAP}]{{0,2}}[1-9](?:[()/.{_GAP}]{{0,3}}\d){{5,13}}"
    rf"|\(?\d{{3}}(?:\)[{_GAP}]?|[.{_GAP}])\d{{3}}[.{_GAP}]\d{{4}})(?!\w)"
)
_LEAST_CARD_DIGITS = 13
_OWN_BLANK, _MAIL_BLANK, _CARD_BLANK, _PHONE_BLANK = "[redacted]", "[mail]", "[card]", "[phone]"
PLACEHOLDERS = (_OWN_BLANK, _MAIL_BLANK, _CARD_BLANK, _PHONE_BLANK)
"""What stands in place of what was blanked: a text with one of them is not the one that a model saw or wrote."""


class Redactor:
    """Replaces what matches by its kind in brackets.

    Args:
        own: further patterns, tried first.
    """

    def __init__(self, own: Sequence[str] = ()) -> None:
        self._own = [re.compile(pattern) for pattern in own]

    def text(self, text: str) -> str:
        """A text without what must not be kept."""
        for pattern in self._own:
            text = pattern.sub(_OWN_BLANK, text)
        text = _MAIL.sub(_MAIL_BLANK, text)
        text = _CARD.sub(_blank_card, text)
        return _PHONE.sub(_PHONE_BLANK, text)

    def strings(self, value: Any) -> Any:
        """A JSON value with every string, key and whole number in it redacted."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, int) and not isinstance(value, bool):
            blanked = self.text(str(value))
            return value if blanked == str(value) else blanked
        if isinstance(value, list):
            return [self.strings(one) for one in value]
        if isinstance(value, dict):
            return {self.text(key): self.strings(one) for key, one in value.items()}
        return value


def _blank_card(match: re.Match[str]) -> str:
    """The longest beginning that is a card number goes: other digits may follow it closely."""
    text = match[0]
    for end in range(len(text), _LEAST_CARD_DIGITS - 1, -1):
        if text[end - 1].isdigit() and _luhn(text[:end]):
            return _CARD_BLANK + text[end:]
    return text


def _luhn(number: str) -> bool:
    """The check digit of ISO/IEC 7812, which nine of ten random numbers fail."""
    digits = [int(digit) for digit in number if digit.isdigit()]
    if len(digits) < _LEAST_CARD_DIGITS:
        return False
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
