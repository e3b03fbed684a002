"""Reconciles the served version with the desired one.

Engines are started, changed and stopped only by code called from here. There are two loops, which never change the same
engine concurrently. The first loop starts an engine wherever one is missing, with backoff after failures
(`Reviver.run`). The second loop changes the version (`Reconciler.follow`), and every change ends in the same steps:

    rollout requested ─▶ Rollouts.carry_out: shadow, canary ─▶ candidate desired ┐
    svc promote --direct, svc rollback ────────────────────▶ version desired ────┴▶ change_to ─▶ Swap ─▶ EngineChange

If a swap fails, the previous desired state is restored, so that the desired state always names the served version.
A swap stops when another version is desired. If the store is not responding, serving continues, and the desired
version is read later.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.engines.pool import EnginePool
from serving.rollout.cancellation import Cancellation, SupersededError, meanwhile
from serving.rollout.journal import Journal
from serving.rollout.leadership import Leadership
from serving.rollout.production_alias import ProductionAlias
from serving.rollout.reviver import Reviver, start_engine
from serving.rollout.rollout import Rollouts
from serving.rollout.served import Began, is_served_elsewhere
from serving.rollout.store_retry import STORE_PAUSE_S, retrying
from serving.rollout.swap import Swap
from serving.rollout.swap_plan import Report
from serving.store_changes.changes import Changes
from svc.engine.state import EngineState
from svc.errors import BusyError, SvcError, SwapError
from svc.store.desired import Desired, change_desired, read_desired
from svc.store.outage_log import log_store_error
from svc.store.rollouts import RolloutState, active_rollout
from svc.store.swaps import SwapOutcome, SwapResult, end_lost_swaps, failed_elsewhere, find_swap
from svc.version import Target

log = logging.getLogger(__name__)

_POLL_S = 0.25
_ALIAS_WAIT_S = 5.0
"""Seconds after which a promotion is reported as done even if MLflow has not stored the alias yet."""
_STOPPED = "the server stopped during the swap"


@dataclass(eq=False)
class Reconciler:
    """Makes a model's engines run the desired version, and keeps them running it.

    Attributes:
        actual: the state that is being served or started. Initially, this is the state that was desired when
            the server started.
        changes: notifications about changes in the store, which this object waits for.
        leadership: object that knows this server's id, and whether this server is the model's leader.
        swap: object that changes the version of the engines.
        rollouts: object that runs rollouts.
        journal: journal that records swaps. It is closed by the code that stops the server.
        reviver: object that starts an engine for each pool member that has none.
        last_error: reason why the last swap, or the last attempt to start an engine, failed.
        promoting: whether a rollout or swap is in progress. Engines must not idle until it has ended.
    """

    actual: Desired
    store: Store
    changes: Changes
    leadership: Leadership
    pool: EnginePool
    swap: Swap
    rollouts: Rollouts
    journal: Journal
    alias: ProductionAlias

    def __post_init__(self) -> None:
        self._failed: Desired | None = None
        self.last_error: str | None = None
        self.promoting = False
        # Until a swap has completed, only the previous version is known to work.
        self.reviver = Reviver(
            self.pool,
            target=lambda: self.actual.target,
            on_start=self._revived,
            on_error=self.note_error,
        )

    async def start(self) -> None:
        """Start an engine with the desired version if no engine was adopted. The reviver starts the other engines.

        Raises:
            SvcError: the version cannot be served. The error is a SwapError if another version was served before.
                That version then becomes the desired version again, and is served the next time the server starts.
        """
        adopted = bool(self.pool.members)
        self.pool.fill()
        if adopted:
            return
        # During the start: MLflow takes a second to import, and may be down.
        reading = asyncio.create_task(self.alias.read(self.actual.name))
        try:
            await self.pool.members[0].start(self.actual.target)
        except SvcError as error:
            await self._end_cut_off(SwapResult(SwapOutcome.FAILED, str(error)))
            previous, production = self.actual.previous, None
            with suppress(TimeoutError):
                async with asyncio.timeout(_ALIAS_WAIT_S):
                    production = await reading
            if previous is None or production != previous.version or previous.version == self.actual.target.version:
                raise
            if await asyncio.to_thread(is_served_elsewhere, self.store, self.actual.name, self.leadership.server):
                raise  # the other servers keep the version
            await asyncio.to_thread(change_desired, self.store, self.actual, previous, None)
            raise SwapError(
                f"{self.actual.target} cannot be served: {error.wrong}",
                expected=error.expected,
                todo=f"start the server again: it will serve {previous}, the previous version",
            ) from error
        finally:
            reading.cancel()
        self._serves(Began.START)
        await self._end_cut_off(SwapResult(SwapOutcome.SUCCEEDED))

    async def adopt(self) -> bool:
        """Adopt the engines that an earlier server left running, and return whether any was adopted. Call `start` next.

        If only engines with the previous version were left, for example by a server that died during a swap, that
        version is served immediately, and `follow` restarts the swap to the desired version.
        """
        desired = self.actual
        if await self._adopt(desired):
            await self._end_cut_off(SwapResult(SwapOutcome.SUCCEEDED))
            return True
        if desired.previous is None:
            return False
        return await self._adopt(Desired(desired.previous, None, desired.generation - 1))

    async def _adopt(self, desired: Desired) -> bool:
        def serve() -> None:
            self.actual = desired
            self._serves(Began.ADOPTED)

        try:
            return await self.pool.adopt(desired.target, serve)
        except SvcError:
            log.warning("could not adopt a running engine that serves %s", desired.target, exc_info=True)
            return bool(self.pool.members)

    async def follow(self) -> None:
        """Swap to each desired version and carry out requested rollouts, one after another.

        Runs until this task is cancelled.

        Call `start` first. `reviver.run` runs concurrently.
        """
        while True:
            count = self.changes.count
            record = await retrying(active_rollout, self.store, self.actual.name)
            # The desired version comes first, as a rollout compares with it. At its end, the server that leads the
            # rollout swaps as a part of it.
            switching = record is not None and record.state is RolloutState.SWITCHING and self.rollouts.leads
            desired = None if switching else await self._changed()
            self.promoting = bool(record or desired)
            if desired:
                await self.change_to(desired)
            elif record and self.rollouts.takes_part(record, self.actual.generation):
                await self.rollouts.carry_out(record, self.change_to)
            else:
                await self.changes.wait(count, _POLL_S)

    async def _changed(self) -> Desired | None:
        """Return the desired state if it is not in effect yet. A desired state whose swap failed is replaced by the
        served state.

        No error is raised if the store is not responding: the state is read again later.
        """
        try:
            desired = await asyncio.to_thread(read_desired, self.store, self.actual.name)
            if desired is not None and desired == self._failed:
                await self._restore(desired, self.actual)
            elif desired is not None and desired.generation != self.actual.generation:
                return desired
        except SQLAlchemyError:
            log_store_error(log, "could not read the desired state; continuing to serve the current version")
            await asyncio.sleep(STORE_PAUSE_S)
        return None

    async def _cancel_superseded(self, desired: Desired, cancellation: Cancellation) -> None:
        """Wait until another version is desired, then cancel the swap. Promoting the same version again has no
        effect.
        """
        while True:
            count = self.changes.count
            newer = await retrying(read_desired, self.store, desired.name)
            if newer is not None and newer.target != desired.target:
                cancellation.ask(f"superseded by {newer.target}")
                return
            await self.changes.wait(count, _POLL_S)

    async def change_to(self, desired: Desired) -> SwapResult:
        """Put a desired version into production, or restore the desired state if that fails.

        Every promotion and rollback ends with a call to this method. The result is also recorded in the journal.
        """
        before = self.actual
        swap_id = await retrying(self.journal.begin, desired)
        report = partial(self.journal.step, swap_id)
        report(f"{before.target} is being served; {desired.target} is the desired version")
        if desired.forced:
            report(f"the version failed a check; it is promoted anyway, for this reason: {desired.forced}")
        cancellation = Cancellation()
        async with meanwhile(self._cancel_superseded(desired, cancellation)):
            try:
                result = await self._bring(desired, before, report, cancellation)
            except Exception as error:  # a defect; it must stop neither the server nor another model
                log.exception("unexpected error in the swap to %s", desired.target)
                result = self._give_up(before, error)
            try:
                await self._settle(desired, before, result, cancellation)
            except SQLAlchemyError:  # the swap has ended nevertheless; after a failed one, `_changed` writes again
                log_store_error(log, "could not write the desired state; continuing to serve the current version")
            finally:
                self.journal.end(swap_id, result)
            return result

    def _give_up(self, before: Desired, error: Exception) -> SwapResult:
        """Return the result of a swap that failed with an unexpected error.

        Engines that do not run the previous version are marked as dead.
        """
        for engine in self.pool.ready:
            if engine.target != before.target:
                engine.why = f"unexpected error in a swap: {error!r}"
                engine.enter(EngineState.FAILED)
        result = SwapResult(SwapOutcome.FAILED, repr(error))
        self.pool.metrics.swap_ended(result)
        return result

    async def _bring(self, desired: Desired, before: Desired, report: Report, cancellation: Cancellation) -> SwapResult:
        """Put the desired version into production by a swap or, if no engine is serving, by starting an engine."""
        try:
            if not self.pool.ready:
                async with cancellation.holding(self.pool, *self.pool.members):
                    if not self.pool.ready:
                        error = await cancellation.interrupting(self._start(desired.target))
                        return SwapResult(SwapOutcome.FAILED if error else SwapOutcome.SUCCEEDED, error)
        except SupersededError as error:
            return SwapResult(SwapOutcome.CANCELLED, str(error))
        if desired.target == before.target:
            return SwapResult(SwapOutcome.SUCCEEDED)
        result = await self.swap.run(before.target, desired.target, report, cancellation)
        self.pool.metrics.swap_ended(result)
        return result

    async def _start(self, target: Target) -> str | None:
        """Start the first engine with the target's version loaded. Return the reason for a failure, or None.

        The reviver starts the other engines.
        """
        for member in self.pool.members:
            if member.state is EngineState.IDLE:  # a sleeping engine holds the previous version
                await member.stop()
        return await start_engine(self.pool.members[0], target)

    async def _settle(self, desired: Desired, before: Desired, result: SwapResult, cancellation: Cancellation) -> None:
        if result.outcome is SwapOutcome.SUCCEEDED:
            self.actual = desired
            self._serves(Began.SWAP)
            await self._correct_previous(before)
            if desired.target != before.target:
                with suppress(SupersededError):
                    await cancellation.interrupting(self.alias.settled(_ALIAS_WAIT_S))
            return
        self._failed = desired
        self._serves()
        if result.outcome is not SwapOutcome.CANCELLED:  # else another version is desired already
            self.last_error = result.reason
            await self._restore(desired, before)

    async def _restore(self, failed: Desired, before: Desired) -> None:
        """Change the desired version back to the one that this server still serves, so that other servers return to it
        too.

        If that version failed on another server, the desired version is left unchanged: changing it could make the two
        servers reject each other's versions forever. This server serves its version until another one is desired.
        """
        elsewhere = partial(failed_elsewhere, self.store, before.target, server=self.leadership.server)
        if await asyncio.to_thread(elsewhere):
            self.note_error(f"{failed.target} failed on this server, and {before.target} failed on another server")
        else:
            await self._rewrite(failed, before.target, before.previous)

    def _serves(self, began_by: Began | None = None) -> None:
        """Publish the version that is now being served.

        Args:
            began_by: reason for the change, or None if this version was already being served.
        """
        target = self.actual.target
        self.pool.names.serve(target)
        self.pool.metrics.version_loaded(target)
        self.alias.move(target.version)
        if began_by is not None:
            self.journal.serves(self.actual, began_by)

    def _revived(self) -> None:
        """Publish the served version if the first attempt to start an engine failed but a later one has succeeded."""
        if self.pool.names.served is None:
            self._serves(Began.START)

    def note_error(self, error: str) -> None:
        """Set the error that the status shows as the reason why no engine is running."""
        self.last_error = error

    async def _rewrite(self, seen: Desired, target: Target, previous: Target | None) -> None:
        """Replace a desired state in the store, unless it has changed since it was read."""
        try:
            self.actual = await asyncio.to_thread(change_desired, self.store, seen, target, previous)
        except BusyError:
            log.info("another promotion was requested in the meantime and will be carried out next")

    async def _correct_previous(self, before: Desired) -> None:
        """Correct the previous version recorded in the desired state.

        A promotion records the previous version when it is requested. If another promotion is running at that time,
        the recorded version may be wrong. If no other change was requested in between, nothing is corrected: either the
        recorded version is already right, or the state was restored after a failed change. Only the leader makes the
        correction, because different servers may have served different versions.
        """
        is_same = self.actual.target == before.target
        if not self.leadership.leads(before.name) or (not is_same and self.actual.generation == before.generation + 1):
            return
        previous = before.previous if is_same else before.target
        if self.actual.previous != previous:
            await self._rewrite(self.actual, self.actual.target, previous)

    async def _end_cut_off(self, result: SwapResult) -> None:
        """Record the result of a swap that was interrupted because the server stopped.

        The swap counts as failed if the server has now started with a version other than the swap's target.
        """
        if self.leadership.server:  # a server that starts again has another id
            address = self.leadership.address
            await asyncio.to_thread(end_lost_swaps, self.store, self.actual, address, result, _STOPPED)
            return
        last = await asyncio.to_thread(find_swap, self.store, self.actual.name)
        if last is None or last.result is not None:
            return
        if last.generation != self.actual.generation:
            result = SwapResult(SwapOutcome.FAILED, _STOPPED)
        self.journal.step(last.id, f"the server started again with {self.actual.target}")
        self.journal.end(last.id, result)
