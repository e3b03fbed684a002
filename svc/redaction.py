"""Redacts prompts and answers before they are stored.

Replaces this service's keys, email addresses, phone numbers, card numbers and matches of custom patterns. Patterns are
imprecise: a number that only looks like a phone number is redacted in the log (never in the answer), and a phone number
in an unusual notation is not. No pattern covers names or places. To keep all of these out of the log, disable the
storage of prompts and answers.

Clients choose the text, so every pattern here runs in linear time, and custom patterns run within a time
limit.
"""

import re
import time
from collections.abc import Sequence
from typing import Any

import regex  # has a timeout, and releases the GIL so that other threads run

from svc.errors import SvcError
from svc.identity.key_secret import KEY_BLANK, hide_secrets

LIMIT_S = 0.25
"""Maximum CPU time for custom patterns on one text or JSON value, in seconds. Linear patterns process a MiB
in 1 to 100 ms."""

_GAP = " \u00a0\u202f\u2010\u2011-"  # spaces and hyphens, including those that do not break a line
_MAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w-]{1,63}\.)+\w{2,63}")
_CARD = re.compile(rf"(?<!\d)(?:\d{{4}}(?:\.\d{{4}}){{3}}|\d(?:[{_GAP}]?\d){{12,18}})(?!\d)")
# Seven to fifteen digits (E.164). To exclude dates, versions, sizes and IP addresses, a number must begin with + or 0,
# or be grouped as in North America.
_PHONE = re.compile(
    rf"(?<![\w.])(?:(?:\+|00?)[({_GAP}]{{0,2}}[1-9](?:[()/.{_GAP}]{{0,3}}\d){{5,13}}"
    rf"|\(?\d{{3}}(?:\)[{_GAP}]?|[.{_GAP}])\d{{3}}[.{_GAP}]\d{{4}})(?!\w)"
)
_MIN_CARD_DIGITS = 13
_OWN_BLANK, _MAIL_BLANK, _CARD_BLANK, _PHONE_BLANK = "[redacted]", "[mail]", "[card]", "[phone]"
PLACEHOLDERS = (_OWN_BLANK, KEY_BLANK, _MAIL_BLANK, _CARD_BLANK, _PHONE_BLANK)
"""Placeholders for redacted text. A text that contains a placeholder differs from the text that the model read or
wrote."""


class RedactionTimeoutError(SvcError):
    """Raised when a custom pattern takes too long on a text, which then cannot be stored.

    Args:
        pattern: the pattern as configured.
    """

    def __init__(self, pattern: str) -> None:
        super().__init__(
            f"the request_log.redact pattern {pattern!r} took longer than {LIMIT_S:g} s on a single text",
            expected="a pattern without nested repetitions",
            todo="rewrite the pattern so that it can match the same text in only one way",
        )
        self.pattern = pattern


class Redactor:
    """Replaces each match with a placeholder that names the kind of data, for example `[mail]`.

    Args:
        own: custom patterns. They are applied after the key pattern, because a partly removed key would not
            be recognized, and before all other patterns.
    """

    def __init__(self, own: Sequence[str] = ()) -> None:
        self._own = [compile_pattern(pattern) for pattern in own]

    def text(self, text: str) -> str:
        """Return the text with the matches of all patterns replaced.

        Raises:
            RedactionTimeoutError: a custom pattern took too long.
        """
        return self._text(text, _Budget())

    def strings(self, value: Any) -> Any:
        """Return a JSON value with redaction applied to every string, object key and whole number.

        Raises:
            RedactionTimeoutError: custom patterns took too long on the value as a whole.
        """
        return self._strings(value, _Budget())

    def _text(self, text: str, budget: "_Budget") -> str:
        text = hide_secrets(text)
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
            return [self._strings(item, budget) for item in value]
        if isinstance(value, dict):
            return {self._text(key, budget): self._strings(item, budget) for key, item in value.items()}
        return value


def compile_pattern(pattern: str) -> Any:
    """Compile a custom pattern with the semantics of Python's `re`.

    Raises:
        regex.error: the text is not a valid regular expression.
    """
    return regex.compile(pattern, regex.VERSION0)


class _Budget:
    """Remaining CPU time for custom patterns on one text or JSON value."""

    def __init__(self) -> None:
        self._spent_s = 0.0

    def blank(self, pattern: Any, text: str) -> str:
        """Return the text with all matches of a custom pattern replaced."""
        began = time.thread_time()  # without the time for which the thread waits: that says nothing about a pattern
        try:
            if self._spent_s >= LIMIT_S:
                raise TimeoutError
            return str(pattern.sub(_OWN_BLANK, text, timeout=LIMIT_S - self._spent_s))
        except (TimeoutError, MemoryError) as error:  # backtracking takes memory too
            raise RedactionTimeoutError(pattern.pattern) from error
        finally:
            self._spent_s += time.thread_time() - began


def _blank_card(match: re.Match[str]) -> str:
    """Replace the card number at the start of a match, if there is one, and keep any characters after it.

    If several prefixes of the match are valid card numbers, the longest is replaced.
    """
    text = match[0]
    for end in range(len(text), _MIN_CARD_DIGITS - 1, -1):
        if text[end - 1].isdigit() and _luhn(text[:end]):
            return _CARD_BLANK + text[end:]
    return text


def _luhn(number: str) -> bool:
    """Return whether a number's check digit is valid (ISO/IEC 7812). Nine out of ten random numbers fail this check."""
    digits = [int(digit) for digit in number if digit.isdigit()]
    if len(digits) < _MIN_CARD_DIGITS:
        return False
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
