"""Counts what keys use, in memory, and adds it to the store now and then.

`add` takes a microsecond and never waits, so it may be called on an event loop; `flush` writes one row for each key and
model of an hour, and belongs into a thread. A server that dies loses what it has not flushed.
"""

import threading
from collections import defaultdict
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
        self._used: defaultdict[UsageOf, _Sum] = defaultdict(_Sum)
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
            self._used[UsageOf(self._hour, key_id or "", model)].add(1, tokens_in, tokens_out)

    def flush(self) -> None:
        """Writes what was counted since.

        Raises:
            SQLAlchemyError: the store does not take it; the next flush tries again.
        """
        with self._lock:
            used, self._used = self._used, defaultdict(_Sum)
        try:
            add_usage(
                self._store, {of: Usage(each.requests, each.tokens_in, each.tokens_out) for of, each in used.items()}
            )
        except BaseException:
            with self._lock:
                for of, each in used.items():
                    self._used[of].add(each.requests, each.tokens_in, each.tokens_out)
            raise


class _Sum:
    """As `Usage`, but grows in its place: with each request."""

    __slots__ = ("requests", "tokens_in", "tokens_out")

    def __init__(self) -> None:
        self.requests = self.tokens_in = self.tokens_out = 0

    def add(self, requests: int, tokens_in: int, tokens_out: int) -> None:
        self.requests += requests
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out
