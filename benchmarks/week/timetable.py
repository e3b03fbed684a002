"""The week's timetable, as described in README.md. Times are seconds since its start, day 1 at 00:00."""

import re

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400
DAYS = 7
MAIN, SIDE = "triage", "notes"
NIGHT_RATE = 0.2
"""Request rate at night, relative to the rate during the day."""
WAKES: dict[str, tuple[float, tuple[str, ...]]] = {
    "legal": (210.0, ("1 09:00", "3 15:00", "5 10:00", "7 16:00")),
    "quarterly": (45.0, ("2 14:00", "4 11:00", "6 09:00")),
}
"""Models that sleep except at these times, with the seconds their engines take to start."""
MODELS = (MAIN, SIDE, *WAKES)
AWAKE_S = 40 * MINUTE_S
"""How long an idle model receives requests after it was woken, in seconds."""
IDLE_AFTER_S = 10 * MINUTE_S
HEAVY_TIMES = ("09:40", "13:20", "16:10")
"""Times at which the heavy client sends requests, from day 1 to day 5."""
BACKUP_TIME = "03:00"
HOLDOUT_EVERY_S = 6 * HOUR_S
_MOMENT = re.compile(r"(\d) (\d\d):(\d\d)")


def at(moment: str) -> int:
    """Convert a `DAY HH:MM` time to seconds."""
    match = _MOMENT.fullmatch(moment)
    if not match:
        raise ValueError(f"{moment!r} must have the form DAY HH:MM")
    day, hours, minutes = map(int, match.groups())
    return (day - 1) * DAY_S + hours * HOUR_S + minutes * MINUTE_S


def moment(seconds: float) -> str:
    """Format a time in seconds as `DAY HH:MM`."""
    minutes = int(seconds) // MINUTE_S
    return f"{minutes // 1440 + 1} {minutes % 1440 // 60:02}:{minutes % 60:02}"


IN_PLACE_AT, CRASHES_AT, CRASHES_END = at("2 10:30"), at("3 11:00"), at("3 11:25")
ROLLING_AT, BLUE_GREEN_AT, SHIFT_AT = at("4 10:00"), at("5 15:00"), at("6 14:00")


def is_day(seconds: float) -> bool:
    """Return whether a time is between 07:00 and 21:00."""
    return 7 * HOUR_S <= seconds % DAY_S < 21 * HOUR_S


def is_weekend(seconds: float) -> bool:
    """Return whether a time is on day 6 or 7."""
    return seconds >= 5 * DAY_S
