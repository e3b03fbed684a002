"""Keeps reading the stored state of a rollout in progress.

If a server cannot read the state, it must stop sending clients to the candidate after `LEASE_S`, because another server
may be leading the rollout by then and may have rolled it back.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.rollout.cancellation import Cancellation
from serving.rollout.leadership import Leadership
from serving.store_changes.changes import Changes
from svc.store.desired import Desired, read_desired
from svc.store.leases import LEASE_S
from svc.store.outage_log import log_store_error
from svc.store.rollouts import RolloutRecord, RolloutState, find_rollout

log = logging.getLogger(__name__)

_POLL_S = 0.25
_STORE_PAUSE_S = 2.0


class Reading(NamedTuple):
    """A rollout and the desired state of its model, as read from the store.

    Attributes:
        began: time at which the read began, in seconds on the monotonic clock.
    """

    began: float
    desired: Desired | None
    record: RolloutRecord


class RolloutWatch:
    """The state of a rollout as last read from the store.

    Args:
        on_lapse: function called when the state has not been read successfully for `LEASE_S`.

    Attributes:
        seen: the rollout, as last read.
        lapsed: whether `on_lapse` has been called since `renew`.
        cancellation: requested when this server must no longer take part: a user stopped the rollout, another version
            became the desired version, or the rollout has ended.
    """

    def __init__(
        self,
        store: Store,
        changes: Changes,
        leadership: Leadership,
        record: RolloutRecord,
        on_lapse: Callable[[], None],
    ) -> None:
        self._store = store
        self._changes = changes
        self._leadership = leadership
        self._on_lapse = on_lapse
        self._timer: asyncio.TimerHandle | None = None
        self.seen = record
        self.lapsed = False
        self.cancellation = Cancellation()

    async def run(self) -> None:
        """Read the state after each change in the store, until cancelled."""
        while True:
            count = self._changes.count
            try:
                self._note(await asyncio.to_thread(self.read))
            except SQLAlchemyError:
                log_store_error(log, "could not read the rollout of %s; continuing it", self.seen.target)
                await asyncio.sleep(_STORE_PAUSE_S)
            await self._changes.wait(count, _POLL_S)

    def read(self) -> Reading:
        """Read the store. This must not run on the event loop's thread."""
        # In this order: the switch to the candidate changes both, and must not look like another promotion.
        began, desired = time.monotonic(), read_desired(self._store, self.seen.name)
        record = find_rollout(self._store, self.seen.name, self.seen.id)
        return Reading(began, desired, record or self.seen)  # rollouts are never deleted

    def renew(self, reading: Reading) -> RolloutRecord:
        """Set `lapsed` to False, update the state from a new reading, and return the rollout."""
        self.lapsed = False
        self._note(reading)
        return self.seen

    def close(self) -> None:
        """Stop the timer that calls `on_lapse`."""
        if self._timer:
            self._timer.cancel()

    def _note(self, reading: Reading) -> None:
        self.close()
        if self._leadership.server:
            left_s = reading.began + LEASE_S - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(left_s, self._lapse)
        self.seen, desired = reading.record, reading.desired
        if self.seen.state is RolloutState.ENDED:
            self.cancellation.ask("the rollout has ended")
        elif self.seen.stop is not None:
            self.cancellation.ask(self.seen.stop)
        elif self.seen.state is not RolloutState.SWITCHING and desired and desired.generation != self.seen.generation:
            self.cancellation.ask(f"{desired.target} was promoted in the meantime")

    def _lapse(self) -> None:
        log.warning(
            "the rollout of %s could not be read for %g s; %s serves all clients until the rollout can be read again",
            self.seen.target,
            LEASE_S,
            self.seen.previous,
        )
        self.lapsed = True
        self._on_lapse()
