"""Counts what keys use, in memory, and adds it to the store now and then.

`add` takes a microsecond and never waits, so it may be called on an event loop; `flush` writes one row for each key and
model of an hour, and belongs into a thread. A server that dies loses what it has not flushed.
"""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine as Store

from svc.store.usage import Usage, UsageOf, add_usage, hour_of

_HOUR = timedelta(hours=1)


class UsageMeter:
    """Counts.

    Args:
        now: the time.
    """

    def __init__(self, store: Store, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._now = now
        self._lock = threading.Lock()
        self._used: dict[UsageOf, Usage] = {}  # of hours that have ended, and what a flush did not write
        self._hour = hour_of(now())
        self._next_hour = self._hour + _HOUR
        self._this_hour: dict[tuple[str, str], list[int]] = {}  # by key and model: the figures of a Usage

    def add(self, key_id: str | None, model: str, *, tokens_in: int, tokens_out: int) -> None:
        """Counts a request that has ended.

        Args:
            key_id: None where there was no key.
            model: a name that the server knows, and no client's own text.
        """
        now, of = self._now(), (key_id or "", model)
        with self._lock:
            if not self._hour <= now < self._next_hour:
                self._end_hour()
                self._hour = hour_of(now)
                self._next_hour = self._hour + _HOUR
            figures = self._this_hour.get(of)
            if figures is None:
                figures = self._this_hour[of] = [0, 0, 0]
            figures[0] += 1
            figures[1] += tokens_in
            figures[2] += tokens_out

    def flush(self) -> None:
        """Writes what was counted since.

        Raises:
            SQLAlchemyError: the store does not take it; the next flush tries again.
        """
        with self._lock:
            self._end_hour()
            used, self._used = self._used, {}
        try:
            add_usage(self._store, used)
        except BaseException:
            with self._lock:
                for of, usage in used.items():
                    self._add(of, usage)
            raise

    def _end_hour(self) -> None:
        """With the lock held."""
        for (key_id, model), figures in self._this_hour.items():
            self._add(UsageOf(self._hour, key_id, model), Usage(*figures))
        self._this_hour.clear()

    def _add(self, of: UsageOf, usage: Usage) -> None:
        """With the lock held."""
        before = self._used.get(of)
        self._used[of] = before.plus(usage) if before else usage
