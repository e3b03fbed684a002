"""Limits how often the server logs warnings that any client can cause, such as warnings about malformed requests."""

import logging
import math
import time
from collections.abc import Callable

_INTERVAL_S = 60.0


class WarningLimit(logging.Filter):
    """Logging filter that lets each warning through at most once per minute.

    The arguments of a warning are ignored when comparing warnings. Records of other levels always pass.

    Args:
        clock: function that returns monotonic time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._logged: dict[str, float] = {}  # by text without arguments: a program has few of them

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record should be logged."""
        if record.levelno != logging.WARNING:
            return True
        now = self._clock()
        if now - self._logged.get(record.msg, -math.inf) < _INTERVAL_S:
            return False
        self._logged[record.msg] = now
        return True
