"""Determines which models this server leads, if several servers use one store.

Every server serves every model and switches to each new desired version. Work that must happen only once, such as
the decisions of a rollout, is done by the server that holds the model's lease. With SQLite, there is one server, which
leads everything.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from uuid import uuid4

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.rollout.served import resume_serving
from serving.store_changes.changes import Changes
from svc.store.database import is_sqlite
from svc.store.leases import LEASE_S, Lease, LeaseLostError, remove_server, report_server
from svc.store.outage_log import log_store_error

log = logging.getLogger(__name__)

EVERYTHING = "*"
"""Name of the lease for work that is not specific to a model. No model can have this name."""
_REPORT_S = LEASE_S / 3
_CLOSE_S = 5.0
"""Maximum wait, in seconds, for an unresponsive store when the server stops. The server's engines are stopped
afterwards."""


class Leadership:
    """Holds this server's leases and extends them.

    Args:
        models: function that returns the names of the models that this server serves.
        clock: function that returns monotonic time, in seconds.

    Attributes:
        address: host name and port of this server, for display.
        server: random id of this server; empty if no other server can use the store.
    """

    def __init__(
        self,
        store: Store,
        changes: Changes,
        address: str,
        models: Callable[[], Collection[str]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._changes = changes
        self.address = address
        self._models = models
        self._clock = clock
        self._leases: Mapping[str, Lease] = {}
        self._until = float("-inf")
        self._reporting = threading.Lock()
        self._closed = False
        self.server = "" if is_sqlite(store) else uuid4().hex

    def leads(self, name: str) -> bool:
        """Return whether this server is the leader for a model now. A server that cannot reach the store stops being
        the leader after `LEASE_S`.
        """
        return not self.server or (name in self._leases and self._clock() < self._until)

    def lease(self, name: str) -> Lease | None:
        """Return the lease that must be passed when writing a model's state to the store, or None if no other server
        can use the store.

        Raises:
            LeaseLostError: this server is not the leader for the model.
        """
        if not self.server:
            return None
        if not self.leads(name):
            raise LeaseLostError(f"this server is not the leader for {name}")
        return self._leases[name]

    async def run(self) -> None:
        """Report to the store and extend the leases, at regular intervals until cancelled."""
        if not self.server:
            await asyncio.Event().wait()
        while True:
            await self.report()
            await asyncio.sleep(_REPORT_S)

    async def report(self) -> None:
        """Report that this server is running, extend its leases and take free ones. If the set of models that it leads
        has changed, wake the tasks that wait for changes. With SQLite, nothing is reported.
        """
        if not self.server:
            return
        names, began, before = [EVERYTHING, *self._models()], self._clock(), set(self._leases)
        try:
            leases = await asyncio.to_thread(self._report, names)
        except SQLAlchemyError:
            log_store_error(
                log,
                "could not extend this server's leases; unless they are extended within %.0f s, "
                "this server will lose leadership",
                LEASE_S,
            )
            return
        self._leases, self._until = leases, began + LEASE_S
        if before != set(leases):
            log.info("this server is now the leader for: %s", ", ".join(sorted(leases)) or "nothing")
            self._changes.announce()

    def _report(self, names: Collection[str]) -> dict[str, Lease]:
        with self._reporting:
            if self._closed:  # a report that began before must not take the leases again
                return {}
            leases = report_server(self._store, self.server, self.address, names)
            if self._clock() >= self._until:
                resume_serving(self._store, self.server)
            return leases

    def _sign_off(self) -> None:
        with self._reporting:
            self._closed = True
            remove_server(self._store, self.server)

    async def close(self) -> None:
        """Release the leases, so that another server can take them immediately."""
        if self.server:
            try:
                async with asyncio.timeout(_CLOSE_S):
                    await asyncio.to_thread(self._sign_off)
            except (SQLAlchemyError, TimeoutError):
                log_store_error(log, "could not release the leases of this server; they expire in %.0f s", LEASE_S)
