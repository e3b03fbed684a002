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
        self._used: dict[UsageOf, Usage] = {}
        self._hour = hour_of(now())

    def add(self, key_id: str | None, model: str, *, tokens_in: int, tokens_out: int) -> None:
        """Counts a request that has ended.

        Args:
            key_id: None where there was no key.
            model: a name that the server knows, and no client's own text.
        """
        now = self._now()
        with self._lock:
            if not self._hour <= now < self._hour + _HOUR:
                self._hour = hour_of(now)
            self._add(UsageOf(self._hour, key_id or "", model), Usage(1, tokens_in, tokens_out))

    def flush(self) -> None:
        """Writes what was counted since.

        Raises:
            SQLAlchemyError: the store does not take it; the next flush tries again.
        """
        with self._lock:
            used, self._used = self._used, {}
        try:
            add_usage(self._store, used)
        except BaseException:
            with self._lock:
                for of, usage in used.items():
                    self._add(of, usage)
            raise

    def _add(self, of: UsageOf, usage: Usage) -> None:
        """With the lock held."""
        before = self._used.get(of)
        self._used[of] = before.plus(usage) if before else usage
