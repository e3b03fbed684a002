"""Makes what serves equal to what is desired, and keeps it so: the only owner of the engines' fate.

Two loops, which never touch one engine at a time: an engine is missing -> start it, slower after each failure; the
desired version changed -> swap, and where that fails put the desired state back, so that it always names what truly
serves. A swap hears a newer wish for another version, and ends. A store that does not answer stops neither: what serves
goes on, and the wish is read later.
"""

import asyncio
import logging
from contextlib import suppress
from functools import partial

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.model_names import ModelNames
from serving.replicas.pool import EnginePool
from serving.replicas.slots import EngineSlots
from serving.rollout.cancellation import Cancellation, SupersededError
from serving.rollout.journal import Journal
from serving.rollout.production_alias import ProductionAlias
from serving.rollout.reviver import Reviver, start_engine
from serving.rollout.swap import Swap
from serving.rollout.swap_plan import Report
from serving.telemetry.deployment_metrics import DeploymentMetrics
from svc.engine.state import EngineState
from svc.errors import BusyError, SvcError, SwapError
from svc.store.desired import Desired, change_desired, read_desired
from svc.store.served import Began
from svc.store.swaps import SwapOutcome, SwapResult, find_swap
from svc.version import Target

log = logging.getLogger(__name__)

_POLL_S = 0.25
_STORE_PAUSE_S = 2.0
_ALIAS_WAIT_S = 5.0
"""A promotion is told done when MLflow says so too, or after this."""


class Reconciler:
    """Owns the engines' fate.

    Args:
        desired: what shall serve when the server starts.
        slots: knows whether there is memory for an engine more.

    Attributes:
        swap: brings another version into the engines.
        journal: what it writes of swaps; closed by who ends the server.
        reviver: starts engines that are missing.
        last_error: why a swap or a start failed last.
        promoting: a swap is planned or under way; the engines must not idle until it has ended.
    """

    def __init__(
        self,
        desired: Desired,
        *,
        store: Store,
        pool: EnginePool,
        swap: Swap,
        names: ModelNames,
        metrics: DeploymentMetrics,
        alias: ProductionAlias,
        slots: EngineSlots,
    ) -> None:
        self._actual = desired
        self._failed: Desired | None = None
        self._store = store
        self.journal = Journal(store)
        self._pool = pool
        self.swap = swap
        self._names = names
        self._metrics = metrics
        self._alias = alias
        self.last_error: str | None = None
        self.promoting = False
        # Until a swap has ended, what served before it is all that is known to work.
        self.reviver = Reviver(
            pool,
            target=lambda: self._actual.target,
            slots=slots,
            on_start=self._revived,
            on_error=self.note_error,
        )

    @property
    def actual(self) -> Desired:
        """What serves, or is being started."""
        return self._actual

    async def start(self) -> None:
        """Starts an engine with the desired version, where none was adopted; others follow.

        Raises:
            SvcError: it cannot serve; at the first start a person is there to read it. SwapError where another version
                served before: that one is desired again, and the next start comes up with it.
        """
        adopted = bool(self._pool.members)
        self._pool.fill()
        if adopted:
            return
        # Beside the start: MLflow takes a second to import, and may be away.
        reading = asyncio.create_task(self._alias.read(self._actual.name))
        try:
            await self._pool.members[0].start(self._actual.target)
        except SvcError as error:
            await self._end_cut_off(SwapResult(SwapOutcome.FAILED, str(error)))
            previous, production = self._actual.previous, None
            with suppress(TimeoutError):
                async with asyncio.timeout(_ALIAS_WAIT_S):
                    production = await reading
            if previous is None or production != previous.version or previous.version == self._actual.target.version:
                raise
            await asyncio.to_thread(change_desired, self._store, self._actual, previous, None)
            raise SwapError(
                f"{self._actual.target} cannot be served: {error.wrong}",
                expected=error.expected,
                todo=f"start again: {previous}, which served before, is what shall serve",
            ) from error
        finally:
            reading.cancel()
        self._serves(Began.START)
        await self._end_cut_off(SwapResult(SwapOutcome.SUCCEEDED))

    async def adopt(self) -> bool:
        """Adopts the engines that an earlier server left; `start` comes next. Whether there was one.

        Where only engines with the version before were left, as by a server that died during a swap, that version
        serves at once, and `run` takes the wish up again.
        """
        desired = self._actual
        if await self._found(desired):
            await self._end_cut_off(SwapResult(SwapOutcome.SUCCEEDED))
            return True
        if desired.previous is None:
            return False
        return await self._found(Desired(desired.previous, None, desired.generation - 1))

    async def _found(self, found: Desired) -> bool:
        def serve() -> None:
            self._actual = found
            self._serves(Began.ADOPTED)

        try:
            return await self._pool.adopt(found.target, serve)
        except SvcError:
            log.warning("no engine with %s can be adopted", found.target, exc_info=True)
            return bool(self._pool.members)

    async def follow(self) -> None:
        """Carry out each desired version until cancelled. Call `start` first; `reviver.run` runs concurrently."""
        while True:
            desired = await self._changed()
            self.promoting = True
            try:
                await self._promote(desired)
            except SQLAlchemyError as error:
                self.last_error = f"the store does not answer: {error}"
                log.exception("the store does not answer; what serves goes on")
                await asyncio.sleep(_STORE_PAUSE_S)
            finally:
                self.promoting = False

    async def _changed(self) -> Desired:
        """Returns a wish that was not taken up yet."""
        while True:
            try:
                found = await asyncio.to_thread(read_desired, self._store, self._actual.name)
                if found is not None and found == self._failed:
                    await self._rewrite(found, self._actual.target, self._actual.previous)
                elif found is not None and found.generation != self._actual.generation:
                    return found
            except SQLAlchemyError:
                log.exception("the desired state cannot be read; what serves goes on")
                await asyncio.sleep(_STORE_PAUSE_S)
            await asyncio.sleep(_POLL_S)

    async def _cancel_superseded(self, desired: Desired, cancellation: Cancellation) -> None:
        """Asks for the cancellation when another version is wanted; the same one, wanted again, is on its way."""
        while True:
            try:
                found = await asyncio.to_thread(read_desired, self._store, desired.name)
            except SQLAlchemyError:
                log.exception("the desired state cannot be read; the swap goes on")
                await asyncio.sleep(_STORE_PAUSE_S)
            else:
                if found is not None and found.target != desired.target:
                    cancellation.ask(f"superseded by {found.target}")
                    return
            await asyncio.sleep(_POLL_S)

    async def _promote(self, desired: Desired) -> None:
        before = self._actual
        swap_id = await self.journal.begin(desired)
        report = partial(self.journal.step, swap_id)
        report(f"{before.target} serves, {desired.target} is wanted")
        if desired.forced:
            report(f"it failed a check, and is wanted all the same: {desired.forced}")
        cancellation = Cancellation()
        listening = asyncio.create_task(self._cancel_superseded(desired, cancellation))
        try:
            try:
                result = await self._bring(desired, before, report, cancellation)
            except Exception as error:  # a defect; it must end neither the server nor another model
                log.exception("the swap to %s has a defect", desired.target)
                result = self._give_up(before, error)
            try:
                await self._settle(desired, before, result, cancellation)
            finally:
                self.journal.end(swap_id, result)
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    def _give_up(self, before: Desired, error: Exception) -> SwapResult:
        """Return the result of a swap with a defect. Engines with another version than before count as dead."""
        for engine in self._pool.ready:
            if engine.target != before.target:
                engine.why = f"a swap failed: {error!r}"
                engine.enter(EngineState.FAILED)
        result = SwapResult(SwapOutcome.FAILED, repr(error))
        self._metrics.swap_ended(result)
        return result

    async def _bring(self, desired: Desired, before: Desired, report: Report, cancellation: Cancellation) -> SwapResult:
        """Has the desired version serve, by an engine that starts with it where none serves."""
        try:
            if not self._pool.ready:
                async with cancellation.holding(self._pool, self._pool.members):
                    if not self._pool.ready:
                        error = await cancellation.interrupting(self._start(desired.target))
                        return SwapResult(SwapOutcome.FAILED if error else SwapOutcome.SUCCEEDED, error)
        except SupersededError as error:
            return SwapResult(SwapOutcome.CANCELLED, str(error))
        if desired.target == before.target:
            return SwapResult(SwapOutcome.SUCCEEDED)
        result = await self.swap.run(before.target, desired.target, report, cancellation)
        self._metrics.swap_ended(result)
        return result

    async def _start(self, target: Target) -> str | None:
        """Start the first engine with a version; return why it did not start. The reviver starts the others."""
        for member in self._pool.members:
            if member.state is EngineState.IDLE:  # asleep, its engine holds the version before
                await member.stop()
        return await start_engine(self._pool.members[0], target)

    async def _settle(self, desired: Desired, before: Desired, result: SwapResult, cancellation: Cancellation) -> None:
        if result.outcome is SwapOutcome.SUCCEEDED:
            self._actual = desired
            self._serves(Began.SWAP)
            await self._correct_previous(before)
            if desired.target != before.target:
                with suppress(SupersededError):
                    await cancellation.interrupting(self._alias.settled(_ALIAS_WAIT_S))
            return
        self._failed = desired
        self._serves()
        if result.outcome is not SwapOutcome.CANCELLED:  # then another wish is there already
            self.last_error = result.reason
            await self._rewrite(desired, before.target, before.previous)

    def _serves(self, began_by: Began | None = None) -> None:
        """Tells everybody what serves now.

        Args:
            began_by: why; None where it is what served before.
        """
        target = self._actual.target
        self._names.serve(target)
        self._metrics.version_loaded(target)
        self._alias.move(target.version)
        if began_by is not None:
            self.journal.serves(self._actual, began_by)

    def _revived(self) -> None:
        """An engine was started beside all swaps: where the first start had failed, a version serves from now on."""
        if self._names.served is None:
            self._serves(Began.START)

    def note_error(self, error: str) -> None:
        """Keeps why there is no engine, for the status."""
        self.last_error = error

    async def _rewrite(self, seen: Desired, target: Target, previous: Target | None) -> None:
        """Write another desired state over one that was seen, unless it has changed since."""
        try:
            self._actual = await asyncio.to_thread(change_desired, self._store, seen, target, previous)
        except BusyError:
            log.info("somebody promoted again meanwhile; the next turn takes it up")

    async def _correct_previous(self, before: Desired) -> None:
        """Who promotes while another promotion is under way can only guess what will have served before."""
        previous = before.previous if self._actual.target == before.target else before.target
        if self._actual.previous != previous:
            await self._rewrite(self._actual, self._actual.target, previous)

    async def _end_cut_off(self, result: SwapResult) -> None:
        """Ends the entry of a swap during which a server ended: this start has decided it."""
        last = await asyncio.to_thread(find_swap, self._store, self._actual.name)
        if last is None or last.result is not None:
            return
        if last.generation != self._actual.generation:
            result = SwapResult(SwapOutcome.FAILED, "the server ended during the swap")
        self.journal.step(last.id, f"the server started again with {self._actual.target}")
        self.journal.end(last.id, result)
