"""Counts usage per key in memory, and adds it to the store at intervals.

`add` takes a few microseconds and never waits, so it may be called on an event loop. `flush` writes one row
for each key, model and hour, and must be called in a thread. If a server dies, the usage since the last
flush is lost.
"""

import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from sqlalchemy import Engine as Store

from serving.access.usage import Usage, UsageOf, add_usage

_HOUR_S = 3600
_Of = tuple[int, str, str]
"""The hour (in hours since 1970), key id and model for which usage is counted. The type is a tuple because hashing a
`UsageOf` would take longer than everything else in this module."""


class UsageMeter:
    """Counts usage that has not been written to the store yet.

    Args:
        now: function that returns the current time.
    """

    def __init__(self, store: Store, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._now = now
        self._lock = threading.Lock()
        self._used: dict[_Of, Usage] = {}  # not yet written by a flush

    def add(self, key_id: str | None, model: str, *, tokens_in: int, tokens_out: int) -> None:
        """Count a finished request.

        Args:
            key_id: id of the key used for the request, or None if no key was used.
            model: name of a model that the server knows, never arbitrary text from a client.
        """
        with self._lock:
            hour = int(self._now().timestamp()) // _HOUR_S
            self._add((hour, key_id or "", model), Usage(1, tokens_in, tokens_out))

    def flush(self) -> Mapping[UsageOf, Usage]:
        """Write the usage counted since the last flush, and return it.

        Raises:
            SQLAlchemyError: the store failed. The next flush tries again.
        """
        with self._lock:
            used, self._used = self._used, {}
        rows = {
            UsageOf(datetime.fromtimestamp(hour * _HOUR_S, UTC), key_id, model): usage
            for (hour, key_id, model), usage in used.items()
        }
        try:
            add_usage(self._store, rows)
        except BaseException:
            with self._lock:
                for of, usage in used.items():
                    self._add(of, usage)
            raise
        return rows

    def _add(self, of: _Of, usage: Usage) -> None:
        """Add to the usage in memory. The caller must hold the lock."""
        self._used[of] = self._used.get(of, Usage()).plus(usage)
