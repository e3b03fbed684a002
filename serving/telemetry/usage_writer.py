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
    """Writes what a meter counts into the store.

    Args:
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

    async def run(self) -> None:
        """Write until cancelled."""
        known = False
        while True:
            try:
                if not known:
                    self._on_known(await asyncio.to_thread(_used_today, self._store))
                    known = True
                await asyncio.to_thread(self._meter.flush)
            except SQLAlchemyError:
                log.exception("what keys used was not written; it is tried again")
            await asyncio.sleep(self._every_s)

    def close(self) -> None:
        """Write what is left; if the store fails, that is lost."""
        try:
            self._meter.flush()
        except SQLAlchemyError:
            log.exception("what keys used in the last seconds was not written")


def _used_today(store: Store) -> Mapping[str, int]:
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    used = Counter[str]()
    for total in usage_since(store, midnight):
        if total.key_id:  # requests without a key have no limits
            used[total.key_id] += total.usage.tokens_in + total.usage.tokens_out
    return used
