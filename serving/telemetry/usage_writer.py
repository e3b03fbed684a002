"""Write the usage of each key to the store in a thread, every few seconds and when the server stops.

Each key's usage so far today is read first, so that limits survive a restart. Nothing is written before
that, because the server would otherwise read back its own counts.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from svc.access.usage_meter import UsageMeter
from svc.store.outage_log import log_store_error
from svc.store.usage import usage_since

log = logging.getLogger(__name__)

_EVERY_S = 5.0
"""Seconds between writes, and therefore the most usage that is lost if the server dies. Each write adds one
row for each key and model in use."""


@dataclass(frozen=True, slots=True, eq=False)
class UsageWriter:
    """Writes the counts of a usage meter to the store.

    Attributes:
        on_known: function called once with the number of tokens used today, keyed by key id.
    """

    store: Store
    meter: UsageMeter
    on_known: Callable[[Mapping[str, int]], None]
    every_s: float = _EVERY_S

    async def run(self) -> None:
        """Write the counts periodically until cancelled."""
        known = False
        while True:
            try:
                if not known:
                    self.on_known(await asyncio.to_thread(_used_today, self.store))
                    known = True
                await asyncio.to_thread(self.meter.flush)
            except SQLAlchemyError:
                log_store_error(log, "could not write the usage counts per key; retrying")
            await asyncio.sleep(self.every_s)

    def close(self) -> None:
        """Write the remaining counts. If the store fails, they are lost."""
        try:
            self.meter.flush()
        except SQLAlchemyError:
            log_store_error(log, "could not write the latest usage counts per key, which are lost")


def _used_today(store: Store) -> Mapping[str, int]:
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    used = Counter[str]()
    for total in usage_since(store, midnight):
        if total.key_id:  # requests without a key have no limits
            used[total.key_id] += total.usage.tokens_in + total.usage.tokens_out
    return used
