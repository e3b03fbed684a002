"""Detects changes in an SQLite store, so that a server's tasks need not each poll the store several times per second.

Every announced change increments a number in the file's header (`svc.store.database.announce_change`). One thread reads
this number regularly, without waking the event loop. Unlike `PRAGMA data_version`, it does not change when rows of
requests or usage are written.
"""

import asyncio
import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.store_changes.changes import Changes
from svc.store.database import count_announced
from svc.store.outage_log import log_store_error

log = logging.getLogger(__name__)

_INTERVAL_S = 0.25
_PAUSE_S = 2.0


@dataclass(eq=False)
class SqliteListener:
    """Notifies a server's tasks of changes in an SQLite store."""

    store: Store
    changes: Changes

    async def run(self) -> None:
        """Notify the server's tasks of changes until cancelled. If the store cannot be read, pause and retry. In the
        meantime, each task polls the store itself.
        """
        loop = asyncio.get_running_loop()
        while True:
            stopped, thread = threading.Event(), ThreadPoolExecutor(max_workers=1, thread_name_prefix="changes")
            try:
                await loop.run_in_executor(thread, self._listen, loop, stopped)
            except SQLAlchemyError:
                log_store_error(log, "could not listen for changes in the store; polling it instead")
            finally:
                stopped.set()
                thread.shutdown(wait=False)
                self.changes.distrust()
            await asyncio.sleep(_PAUSE_S)

    def _listen(self, loop: asyncio.AbstractEventLoop, stopped: threading.Event) -> None:
        """Poll the store and notify `changes` of every change, until `stopped` is set.

        Raises:
            SQLAlchemyError: the store cannot be read.
        """
        with self.store.connect() as connection:
            connection.detach()  # the pool's connections are for the server's other work
            count = count_announced(connection)
            loop.call_soon_threadsafe(self.changes.trust, math.inf)
            while not stopped.wait(_INTERVAL_S):
                if (latest := count_announced(connection)) != count:
                    count = latest
                    loop.call_soon_threadsafe(self.changes.announce)
