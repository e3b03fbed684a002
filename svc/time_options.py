"""Spans and points of time as they are typed: `90d`, `12h`, `2026-12-31`."""

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import click

_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_SPAN = re.compile(r"([0-9]{1,9})([smhdw])")
_LONGEST_S = 36_500 * 86_400


def parse_duration(text: str) -> timedelta:
    """A number and a unit of s, m, h, d or w; 0 needs none.

    Raises:
        ValueError: it is none, or longer than a century.
    """
    match = _SPAN.fullmatch(text)
    if match is None and text != "0":
        raise ValueError(f"{text!r} is no duration: a number and one of s, m, h, d, w, as 90d")
    seconds = int(match[1]) * _UNITS_S[match[2]] if match else 0
    if seconds > _LONGEST_S:
        raise ValueError(f"{text!r} is longer than a century")
    return timedelta(seconds=seconds)


def duration(text: str) -> timedelta:
    """The type of an option that takes a span of time."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def time_to_come(text: str) -> datetime:
    """The type of an option that takes a date, a date with a time, or a span from now; without a zone it is UTC."""
    return _moment(text, 1)


def time_past(text: str) -> datetime:
    """The same for what has been; spans count back."""
    return _moment(text, -1)


def _moment(text: str, direction: int) -> datetime:
    with suppress(ValueError, OverflowError):  # the latter: of a year before the first
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    try:
        return datetime.now(UTC) + direction * parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is neither a date, as 2026-12-31, nor a duration, as 90d") from error
