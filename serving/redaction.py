"""Blanks what must not be kept in prompts and answers: mail addresses, phone and card numbers, and own patterns.

It errs on the side of blanking: a number that only looks like a phone number is lost from the record, never from the
answer. Names and addresses have no pattern; who must keep those out keeps no content.

Every pattern here runs in linear time, because clients choose the text.
"""

import re
from collections.abc import Sequence
from typing import Any

_MAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w-]{1,63}\.)+\w{2,63}")
_CARD = re.compile(r"(?<![\d-])\d(?:[ -]?\d){12,18}(?![\d-])")
# Seven to fifteen digits (E.164). What keeps dates, versions, sizes and IP addresses out is how it begins: with + or
# 0, or grouped as in North America.
_PHONE = re.compile(
    r"(?<![\w.])(?:(?:\+|00?)[ (]{0,2}[1-9](?:[ ()/.-]{0,3}\d){5,13}|\(?\d{3}\)?[ .-]{1,2}\d{3}[ .-]\d{4})(?!\w)"
)


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
            text = pattern.sub("[redacted]", text)
        text = _MAIL.sub("[mail]", text)
        text = _CARD.sub(_blank_card, text)
        return _PHONE.sub("[phone]", text)

    def strings(self, value: Any) -> Any:
        """A JSON value with every string in it redacted; keys stay."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.strings(one) for one in value]
        if isinstance(value, dict):
            return {key: self.strings(one) for key, one in value.items()}
        return value


def _blank_card(match: re.Match[str]) -> str:
    return "[card]" if _luhn(match[0]) else match[0]


def _luhn(number: str) -> bool:
    """The check digit of ISO/IEC 7812, which nine of ten random numbers fail."""
    digits = [int(digit) for digit in number if digit.isdigit()]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
