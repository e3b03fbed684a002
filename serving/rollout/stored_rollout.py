"""A rollout in progress, as stored: keeps reading its state, and stores each state that the leader enters.

If a server cannot read the state, it must stop sending clients to the candidate after `LEASE_S`, because another server
may be leading the rollout by then and may have rolled it back.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

from sqlalchemy import Engine as Store

from serving.rollout.cancellation import Cancellation
from serving.rollout.leadership import Leadership
from serving.rollout.store_retry import retrying
from serving.store_changes.changes import Changes
from svc.store.desired import Desired, read_desired
from svc.store.leases import LEASE_S, Lease, LeaseLostError
from svc.store.rollouts import (
    RolloutOutcome,
    RolloutRecord,
    RolloutState,
    SignalRow,
    enter_state,
    find_rollout,
    store_signals,
    switch_rollout,
)

log = logging.getLogger(__name__)

_POLL_S = 0.25


class StoppedError(Exception):
    """Raised when a rollout must end without promoting its candidate."""

    def __init__(self, outcome: RolloutOutcome, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome
        self.why = why


class _Reading(NamedTuple):
    """A rollout and the desired state of its model, as read from the store.

    Attributes:
        began: time at which the read began, in seconds on the monotonic clock.
    """

    began: float
    desired: Desired | None
    record: RolloutRecord


class StoredRollout:
    """A rollout in the store, as seen by one of the servers that take part in it.

    Args:
        webhooks: URLs to which each transition is reported.
        on_lapse: function called when the state has not been read successfully for `LEASE_S`.

    Attributes:
        record: the rollout when this server's turn began, or as this server has stored it since.
        seen: the rollout, as last read.
        lease: lease with which this server leads the rollout; None if it follows, or if no other server can use the
            store.
        lapsed: whether `on_lapse` has been called in this turn.
        cancellation: requested when this server must no longer take part: a user stopped the rollout, another version
            became the desired version, or the rollout has ended.
    """

    def __init__(
        self,
        store: Store,
        changes: Changes,
        leadership: Leadership,
        webhooks: tuple[str, ...],
        record: RolloutRecord,
        on_lapse: Callable[[], None],
    ) -> None:
        self._store = store
        self._changes = changes
        self._leadership = leadership
        self._webhooks = webhooks
        self._on_lapse = on_lapse
        self._timer: asyncio.TimerHandle | None = None
        self._resumed_at = datetime.now(UTC)
        self._signals: tuple[SignalRow, ...] = ()
        self.record = self.seen = record
        self.lease: Lease | None = None
        self.lapsed = False
        self.cancellation = Cancellation()

    async def watch(self) -> None:
        """Read the state after each change in the store, until cancelled."""
        while True:
            count = self._changes.count
            self._note(await retrying(self._read))
            await self._changes.wait(count, _POLL_S)

    def close(self) -> None:
        """Stop the timer that calls `on_lapse`."""
        if self._timer:
            self._timer.cancel()

    async def begin_turn(self, *, leads: bool) -> RolloutRecord:
        """Begin to lead or to follow the rollout, and return it as it is stored now.

        Raises:
            LeaseLostError: this server cannot lead the rollout.
        """
        self.lease = self._leadership.lease(self.seen.name) if leads else None
        # Read after the lease was taken: since then, no other server can change it.
        reading = await retrying(self._read)
        self.lapsed = False
        self._note(reading)
        self.record = self.seen
        return self.record

    def require_lead(self) -> None:
        """Check that this server has led the rollout without interruption.

        Raises:
            LeaseLostError: this server does not lead the rollout, or another server may have taken it over.
        """
        if self.lapsed or self._leadership.lease(self.record.name) != self.lease:
            raise LeaseLostError("another server may have taken over the rollout in the meantime")

    async def enter(self, state: RolloutState, step: int = 0) -> None:
        """Store that the rollout has entered a state.

        Raises:
            LeaseLostError: another server leads the rollout now.
        """
        self.record = await retrying(
            enter_state, self._store, self.record.id, state, step, lease=self.lease, webhooks=self._webhooks
        )

    async def enter_signals(self, signals: tuple[SignalRow, ...]) -> None:
        """Store the latest verdict on each signal, if it has changed.

        Raises:
            LeaseLostError: another server leads the rollout now.
        """
        if signals != self._signals:
            self._signals = signals
            await retrying(store_signals, self._store, self.record.id, signals, lease=self.lease)

    async def switch(self) -> str | None:
        """Make the candidate the desired version.

        Returns:
            None, or the reason why this is no longer allowed.

        Raises:
            LeaseLostError: another server leads the rollout now.
        """
        if await retrying(switch_rollout, self._store, self.record, lease=self.lease):
            return None
        current = await retrying(find_rollout, self._store, self.record.name, self.record.id)
        if current is not None and current.state is RolloutState.SWITCHING:  # only the first reply was lost
            return None
        return (current and current.stop) or "another version was promoted in the meantime"

    @property
    def step_s(self) -> float:
        """Seconds since the current step began, or since the server restarted if that is later."""
        return (datetime.now(UTC) - max(self.record.step_began_at, self._resumed_at)).total_seconds()

    def _read(self) -> _Reading:
        # In this order: the switch to the candidate changes both, and must not look like another promotion.
        began, desired = time.monotonic(), read_desired(self._store, self.seen.name)
        record = find_rollout(self._store, self.seen.name, self.seen.id)
        return _Reading(began, desired, record or self.seen)  # rollouts are never deleted

    def _note(self, reading: _Reading) -> None:
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
