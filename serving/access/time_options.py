"""Command-line options for durations and points in time, such as `90d`, `12h` or `2026-12-31`."""

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import click

_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_SPAN = re.compile(r"([0-9]{1,9})([smhdw])")
_MAX_S = 36_500 * 86_400


def duration(text: str) -> timedelta:
    """Click parameter type for durations of up to a century: a number with the unit s, m, h, d or w. 0 needs no
    unit.
    """
    match = _SPAN.fullmatch(text)
    if match is None and text != "0":
        raise click.BadParameter(
            f"{text!r} is not a duration; expected a number and one of s, m, h, d, w, for example 90d"
        )
    seconds = int(match[1]) * _UNITS_S[match[2]] if match else 0
    if seconds > _MAX_S:
        raise click.BadParameter(f"{text!r} is longer than a century")
    return timedelta(seconds=seconds)


def time_to_come(text: str) -> datetime:
    """Click parameter type for a future date or time, or a duration from now. The default time zone is UTC."""
    return _moment(text, 1)


def time_past(text: str) -> datetime:
    """Click parameter type for a past date or time, or a duration before now. The default time zone is UTC."""
    return _moment(text, -1)


def _moment(text: str, direction: int) -> datetime:
    with suppress(ValueError, OverflowError):  # OverflowError: a time zone moves the date before the year 1
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    try:
        return datetime.now(UTC) + direction * duration(text)
    except click.BadParameter as error:
        message = f"{text!r} is neither a date, such as 2026-12-31, nor a duration, such as 90d"
        raise click.BadParameter(message) from error
