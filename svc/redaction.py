"""Blanks what must not be kept in prompts and answers: keys of this service, mail addresses, phone and card numbers,
and own patterns.

It does what patterns can: a number that only looks like a phone number is lost from the record, never from the answer,
and one that is written in an unusual way stays. Names and places have no pattern. Who must keep all of that out keeps
no content.

Clients choose the text: every pattern here runs in linear time, and own patterns within a limit.
"""

import re
import time
from collections.abc import Sequence
from typing import Any

import regex  # has a limit of time, and lets other threads run meanwhile

from svc.errors import SvcError
from svc.identity.key_secret import KEY_ID_PATTERN, PREFIX

LIMIT_S = 0.25
"""Of own patterns on one text or JSON value, in processor time, seconds. A linear one reads a MiB in 1 to 100 ms."""

_GAP = " \u00a0\u202f\u2010\u2011-"  # spaces and hyphens, those that do not break a line among them
# Also one that was cut short or mistyped: most of a secret is a secret.
_KEY = re.compile(rf"(?<![0-9A-Za-z]){PREFIX}{KEY_ID_PATTERN}_[0-9A-Za-z]{{8,}}")
_MAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w-]{1,63}\.)+\w{2,63}")
_CARD = re.compile(rf"(?<!\d)(?:\d{{4}}(?:\.\d{{4}}){{3}}|\d(?:[{_GAP}]?\d){{12,18}})(?!\d)")
# Seven to fifteen digits (E.164). What keeps dates, versions, sizes and IP addresses out is how it begins: with + or
# 0, or grouped as in North America.
_PHONE = re.compile(
    rf"(?<![\w.])(?:(?:\+|00?)[({_GAP}]{{0,2}}[1-9](?:[()/.{_GAP}]{{0,3}}\d){{5,13}}"
    rf"|\(?\d{{3}}(?:\)[{_GAP}]?|[.{_GAP}])\d{{3}}[.{_GAP}]\d{{4}})(?!\w)"
)
_LEAST_CARD_DIGITS = 13
_OWN_BLANK, _KEY_BLANK, _MAIL_BLANK, _CARD_BLANK, _PHONE_BLANK = "[redacted]", "[key]", "[mail]", "[card]", "[phone]"
PLACEHOLDERS = (_OWN_BLANK, _KEY_BLANK, _MAIL_BLANK, _CARD_BLANK, _PHONE_BLANK)
"""What stands in place of what was blanked: a text with one of them is not the one that a model saw or wrote."""


class RedactionTimeoutError(SvcError):
    """An own pattern that takes too long on a text, which therefore cannot be kept.

    Args:
        pattern: as it was given.
    """

    def __init__(self, pattern: str) -> None:
        super().__init__(
            f"the pattern {pattern!r} of request_log.redact took longer than {LIMIT_S:g} s on a text",
            expected="a pattern without a repetition inside a repetition",
            todo="write it so that a text matches in one way only",
        )
        self.pattern = pattern


class Redactor:
    """Replaces what matches by its kind in brackets.

    Args:
        own: further patterns, tried before all but keys: what such a pattern leaves of one would not be found.
    """

    def __init__(self, own: Sequence[str] = ()) -> None:
        self._own = [compile_pattern(pattern) for pattern in own]

    def text(self, text: str) -> str:
        """A text without what must not be kept.

        Raises:
            RedactionTimeoutError: an own pattern took too long.
        """
        return self._text(text, _Budget())

    def strings(self, value: Any) -> Any:
        """A JSON value with every string, key and whole number in it redacted.

        Raises:
            RedactionTimeoutError: own patterns took too long on all of it together.
        """
        return self._strings(value, _Budget())

    def _text(self, text: str, budget: "_Budget") -> str:
        text = _KEY.sub(_KEY_BLANK, text)
        for pattern in self._own:
            text = budget.blank(pattern, text)
        text = _MAIL.sub(_MAIL_BLANK, text)
        text = _CARD.sub(_blank_card, text)
        return _PHONE.sub(_PHONE_BLANK, text)

    def _strings(self, value: Any, budget: "_Budget") -> Any:
        if isinstance(value, str):
            return self._text(value, budget)
        if isinstance(value, int) and not isinstance(value, bool):
            blanked = self._text(str(value), budget)
            return value if blanked == str(value) else blanked
        if isinstance(value, list):
            return [self._strings(one, budget) for one in value]
        if isinstance(value, dict):
            return {self._text(key, budget): self._strings(one, budget) for key, one in value.items()}
        return value


def compile_pattern(pattern: str) -> Any:
    """An own pattern, which means what it does to Python's `re`.

    Raises:
        regex.error: it is none.
    """
    return regex.compile(pattern, regex.VERSION0)


class _Budget:
    """What is left of the time for one text or value. Begins when it is made."""

    def __init__(self) -> None:
        self._spent_s = 0.0

    def blank(self, pattern: Any, text: str) -> str:
        """The text without what a pattern matches."""
        began = time.thread_time()  # of this thread: how long it waits for its turn says nothing of a pattern
        try:
            if self._spent_s >= LIMIT_S:
                raise TimeoutError
            return str(pattern.sub(_OWN_BLANK, text, timeout=LIMIT_S - self._spent_s))
        except (TimeoutError, MemoryError) as error:  # what it has to come back to takes memory too
            raise RedactionTimeoutError(pattern.pattern) from error
        finally:
            self._spent_s += time.thread_time() - began


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
