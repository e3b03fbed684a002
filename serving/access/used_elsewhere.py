"""Determines each key's usage on other servers with the same store, from the totals in the store.

The totals include the usage written by all servers. After this server's own usage is subtracted, the increase since the
last reading is the new usage on other servers.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Engine as Store

from serving.access.usage import DayOf, Usage, UsageOf, midnight_of, usage_by_day


class NewUsage(NamedTuple):
    """Usage on other servers that is new since the last reading.

    Attributes:
        recent: usage by key id. Empty in the first reading, because the usage found then may be hours old.
        today: prompt and answer tokens of the current UTC day, by key id. The first reading includes the whole day, and
            also the usage that this server wrote before it was restarted.
    """

    recent: Mapping[str, Usage]
    today: Mapping[str, int]


class UsedElsewhere:
    """Reads the usage of other servers. Its methods must not be called concurrently.

    Days begin at midnight UTC by this machine's clock, as they do for limits. The previous day is also read, because a
    server writes its last usage of a day some seconds after midnight, or hours later if it could not reach the store.

    Args:
        now: function that returns the current time.
    """

    def __init__(self, store: Store, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._now = now
        self._own: dict[DayOf, Usage] = {}
        self._others: Mapping[DayOf, Usage] | None = None

    def written(self, usage: Mapping[UsageOf, Usage]) -> None:
        """Remember usage that this server has written to the store, so that it is not counted as another server's."""
        for of, each in usage.items():
            day = DayOf(midnight_of(of.hour), of.key_id)
            self._own[day] = self._own.get(day, Usage()).plus(each)

    def read(self) -> NewUsage:
        """Read the totals and return the new usage. Call this in a thread.

        Raises:
            SQLAlchemyError: the store failed. The next reading also covers the usage that this one missed.
        """
        midnight = midnight_of(self._now())
        totals = usage_by_day(self._store, midnight)
        before, none = self._others or {}, Usage()
        others = {of: total.minus(self._own.get(of, none)) for of, total in totals.items()}
        recent, today = dict[str, Usage](), dict[str, int]()
        for of, usage in others.items():
            new = Usage(*(max(0, count) for count in usage.minus(before.get(of, none))))  # less after a restored backup
            if of.key_id and new != none:  # requests without a key have no limits
                recent[of.key_id] = recent.get(of.key_id, none).plus(new)
                if of.midnight == midnight:
                    today[of.key_id] = new.tokens
        first, self._others = self._others is None, others
        yesterday = midnight - timedelta(days=1)
        self._own = {of: usage for of, usage in self._own.items() if of.midnight >= yesterday}
        return NewUsage({} if first else recent, today)
