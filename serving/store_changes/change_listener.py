"""Receives PostgreSQL's notifications of changes in the store (LISTEN and NOTIFY), so that a server need not poll the
store several times per second.

A notification can be lost without an error: PgBouncer drops notifications unless it uses session pooling, and after a
failover the old database server sends nothing more. Every minute, the listener therefore sends itself a test
notification, called an echo, through the store's connection pool. If the latest echo has not arrived, the store is
polled as often as with SQLite.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from uuid import uuid4

from sqlalchemy import Engine as Store

from serving.store_changes.changes import Changes
from svc.store.database import announce_change
from svc.store.outage_log import log_store_error
from svc.store.postgresql import listening

log = logging.getLogger(__name__)

_ECHO_INTERVAL_S = 60.0
_ECHO_TIMEOUT_S = 5.0
_PAUSE_S = 2.0
_UNHEARD_PAUSE_S = 600.0
"""Seconds to wait before listening again if this process did not receive its own test notification (the echo). The wait
is long because each attempt makes PgBouncer log a warning."""


class _UnheardError(Exception):
    """Raised when the listener's own test notification, the echo, did not arrive."""


@dataclass(eq=False)
class ChangeListener:
    """Tells a server's tasks about changes in a PostgreSQL store."""

    store: Store
    changes: Changes
    _is_unheard: bool = field(default=False, init=False)

    async def run(self) -> None:
        """Keep announcing changes until cancelled. After an error, reconnect; the store is polled in the meantime."""
        while True:
            pause_s = _PAUSE_S
            try:
                await self._listen()
            except _UnheardError:
                pause_s = _UNHEARD_PAUSE_S
                if not self._is_unheard:
                    log.warning(
                        "notifications from the store are not arriving (a pooler in transaction mode drops them); "
                        "polling the store instead"
                    )
                self._is_unheard = True
            except Exception:  # noqa: BLE001 - the boundary of this task, without which the store is polled
                log_store_error(log, "could not listen for changes in the store; polling it instead")
            finally:
                self.changes.distrust()
            await asyncio.sleep(pause_s)

    async def _listen(self) -> None:
        """Announce changes as long as the listener's own test notifications, the echoes, arrive.

        Raises:
            _UnheardError: an echo did not arrive.
            StoreUnavailableError: a connection to the store failed.
        """
        async with listening(self.store) as connection:
            while True:
                echo, sent_at, is_heard = uuid4().hex, time.monotonic(), False
                await asyncio.to_thread(_send, self.store, echo)
                async for notification in connection.notifies(timeout=_ECHO_INTERVAL_S):
                    if notification.payload == echo:
                        is_heard, self._is_unheard = True, False
                        self.changes.trust(sent_at + _ECHO_INTERVAL_S + _ECHO_TIMEOUT_S - time.monotonic())
                    elif not notification.payload:  # else another server's echo
                        self.changes.announce()
                if not is_heard:
                    raise _UnheardError


def _send(store: Store, echo: str) -> None:
    with store.begin() as connection:
        announce_change(connection, echo)
