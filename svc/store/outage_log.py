"""Logs store errors in retry loops, without a traceback for every attempt while the database is unavailable."""

import logging
import sys
import time

from svc.store.unavailable import StoreUnavailableError

_SAME_OUTAGE_S = 120.0
"""Two failures at most this many seconds apart belong to the same outage. The value exceeds the timeouts for statements
and connection attempts."""
_failed_at: dict[str, float] = {}
"""Time of the last failure, keyed by the logger's name."""


def log_store_error(log: logging.Logger, message: str, *arguments: object) -> None:
    """Log the exception that is being handled, with its traceback.

    An unavailable store is logged as one line without a traceback, and only once per outage and logger.
    """
    error = sys.exception()
    if not isinstance(error, StoreUnavailableError):
        log.error(message, *arguments, exc_info=True, stacklevel=2)
        return
    now = time.monotonic()
    before = _failed_at.get(log.name)
    _failed_at[log.name] = now
    if before is None or now - before > _SAME_OUTAGE_S:
        log.error(f"{message}: %s", *arguments, error, stacklevel=2)
