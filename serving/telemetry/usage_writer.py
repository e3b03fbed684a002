"""Writes the usage of each key to the store in a thread, every few seconds and when the server stops.

At startup, each key's usage on the current day is read from the store, so that daily limits survive a restart. If
several servers can use the store, the usage on the other servers is read after every write.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.access.usage import Usage
from serving.access.usage_meter import UsageMeter
from serving.access.used_elsewhere import NewUsage, UsedElsewhere
from svc.store.database import is_sqlite
from svc.store.leases import running_servers
from svc.store.outage_log import log_store_error

log = logging.getLogger(__name__)

_EVERY_S = 5.0
"""Seconds between writes. If the server dies, at most the usage recorded in this period is lost. Each write adds one
row for each key and model in use."""


@dataclass(eq=False)
class UsageWriter:
    """Writes a usage meter's counts to the store, and reads the counts of other servers.

    Attributes:
        on_used_today: function called with the number of tokens that each key used today, by key id. The first call
            reports the tokens used before this server started; later calls report the tokens that other servers added
            since the previous call.
        on_used_elsewhere: function called with the usage on other servers since the last call, by key id, and with the
            number of running servers.
        now: function that returns the current time, which determines the current day.
    """

    store: Store
    meter: UsageMeter
    on_used_today: Callable[[Mapping[str, int]], None]
    on_used_elsewhere: Callable[[Mapping[str, Usage], int], None]
    every_s: float = _EVERY_S
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def __post_init__(self) -> None:
        self._elsewhere = UsedElsewhere(self.store, now=self.now)
        self._reads = True

    async def run(self) -> None:
        """Periodically write the usage counts to the store and read those of other servers, until cancelled."""
        while True:
            try:
                await self.exchange()
            except SQLAlchemyError:
                log_store_error(log, "could not write the usage counts per key; retrying")
            await asyncio.sleep(self.every_s)

    async def exchange(self) -> None:
        """Write the counts, and read the counts of other servers. With SQLite, there are no other servers, so only the
        first call reads the store.

        Raises:
            SQLAlchemyError: the store failed. The next call tries again.
        """
        written = await asyncio.to_thread(self.meter.flush)
        if self._reads:
            self._elsewhere.written(written)
            new, servers = await asyncio.to_thread(self._read)
            self.on_used_today(new.today)
            self.on_used_elsewhere(new.recent, servers)
            self._reads = not is_sqlite(self.store)

    def close(self) -> None:
        """Write the remaining counts. If the store fails, they are lost."""
        try:
            self.meter.flush()
        except SQLAlchemyError:
            log_store_error(log, "could not write the latest usage counts per key; these counts are lost")

    def _read(self) -> tuple[NewUsage, int]:
        new = self._elsewhere.read()
        servers = len(running_servers(self.store)) if new.recent else 0
        return new, max(2, servers)  # the other server may have stopped since
