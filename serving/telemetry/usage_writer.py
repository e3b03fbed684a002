"""Writes what keys used into the store, every few seconds and at the end, in a thread.

First it tells what each key used today, for limits that outlive a server. Until the store says that, nothing is
written: what this server counted itself would be told back to it.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from svc.access.usage_meter import UsageMeter
from svc.store.usage import usage_since

log = logging.getLogger(__name__)

_EVERY_S = 5.0
"""A server that dies loses so much, and writes one row so often for each key and model that is used."""


class UsageWriter:
    """Writes.

    Args:
        meter: counts.
        on_known: hears once how many tokens each key has used today, by the key's id.
    """

    def __init__(
        self,
        store: Store,
        meter: UsageMeter,
        *,
        on_known: Callable[[Mapping[str, int]], None],
        every_s: float = _EVERY_S,
    ) -> None:
        self._store = store
        self._meter = meter
        self._on_known = on_known
        self._every_s = every_s
        self._known = False

    async def run(self) -> None:
        """Writes until it is cancelled."""
        while True:
            try:
                if not self._known:
                    self._on_known(await asyncio.to_thread(self._used_today))
                    self._known = True
                await asyncio.to_thread(self._meter.flush)
            except SQLAlchemyError:
                log.exception("what keys used was not written; it is tried again")
            await asyncio.sleep(self._every_s)

    def close(self) -> None:
        """Writes what is left; where the store does not take it, that is lost."""
        try:
            self._meter.flush()
        except SQLAlchemyError:
            log.exception("what keys used in the last seconds was not written")

    def _used_today(self) -> Mapping[str, int]:
        midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        used = Counter[str]()
        for total in usage_since(self._store, midnight):
            used[total.key_id] += total.usage.tokens_in + total.usage.tokens_out
        used.pop("", None)  # of requests without a key, which have no limits
        return used
