"""A warning that any client can cause is logged once per minute."""

import logging

from serving.http.warning_limit import WarningLimit
from tests.serving.http.test_failed_keys import Clock


def passes(limit: WarningLimit, message: str, level: int = logging.WARNING) -> bool:
    return bool(limit.filter(logging.LogRecord("any", level, "", 0, message, ("argument",), None)))


def test_warning_is_logged_again_when_a_minute_has_passed() -> None:
    clock = Clock()
    limit = WarningLimit(clock)
    assert passes(limit, "one %s")
    clock.at = 59.0
    assert not passes(limit, "one %s")
    clock.at = 60.0
    assert passes(limit, "one %s")
    assert not passes(limit, "one %s")


def test_warning_is_logged_when_a_different_one_was_just_logged() -> None:
    limit = WarningLimit(Clock())
    assert passes(limit, "one %s")
    assert passes(limit, "other %s")


def test_every_error_is_logged_when_it_is_repeated() -> None:
    limit = WarningLimit(Clock())
    assert passes(limit, "one %s", logging.ERROR)
    assert passes(limit, "one %s", logging.ERROR)
