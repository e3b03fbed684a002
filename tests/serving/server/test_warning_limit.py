"""Tests that a warning any client can cause is logged at most once per minute."""

import logging

from serving.server.warning_limit import WarningLimit
from tests.builders.clocks import Clock


def passes(limit: WarningLimit, message: str, level: int = logging.WARNING) -> bool:
    return bool(limit.filter(logging.LogRecord("any", level, "", 0, message, ("argument",), None)))


def test_warning_is_logged_again_after_one_minute() -> None:
    clock = Clock()
    limit = WarningLimit(clock)
    assert passes(limit, "one %s")
    clock.now = 59.0
    assert not passes(limit, "one %s")
    clock.now = 60.0
    assert passes(limit, "one %s")
    assert not passes(limit, "one %s")


def test_recent_warning_does_not_suppress_a_different_warning() -> None:
    limit = WarningLimit(Clock())
    assert passes(limit, "one %s")
    assert passes(limit, "other %s")


def test_repeated_errors_are_all_logged() -> None:
    limit = WarningLimit(Clock())
    assert passes(limit, "one %s", logging.ERROR)
    assert passes(limit, "one %s", logging.ERROR)
