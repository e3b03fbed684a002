"""Makes what serves equal to what is desired, and keeps it so: the only task that touches the engines.

One loop: an engine is missing -> start it, slower after each failure; the desired version changed -> swap, and where
that fails put the desired state back, so that it always names what truly serves. A store that does not answer stops
neither: what serves goes on, and the wish is read later.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from serving.model_names import ModelNames
from serving.rollout.journal import Journal
from serving.rollout.production_alias import ProductionAlias
from serving.rollout.swap import Swap
from serving.telemetry.deployment_metrics import DeploymentMetrics
from svc.engine.state import EngineState
from svc.errors import BusyError, SvcError, SwapError
from svc.store.desired import Desired, change_desired, read_desired
from svc.store.swaps import SwapOutcome, SwapResult, find_swap
from svc.version import Target

log = logging.getLogger(__name__)

_POLL_S = 0.25
_STORE_PAUSE_S = 2.0
_ALIAS_WAIT_S = 5.0
"""A promotion is told done when MLflow says so too, or after this."""
_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)


@dataclass(slots=True)
class _Turn:
    """When a member without an engine gets one.

    Attributes:
        at: loop time, seconds.
        attempts: starts that failed.
        died: it had an engine.
    """

    at: float
    attempts: int
    died: bool


class Reconciler:
    """Owns the engines' fate.

    Args:
        desired: what shall serve when the server starts.
        backoff_s: pauses before the first, second, ... start after a death; the last one goes on.
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
        backoff_s: tuple[float, ...] = _BACKOFF_S,
    ) -> None:
        self._actual = desired
        self._failed: Desired | None = None
        self._store = store
        self._journal = Journal(store)
        self._pool = pool
        self._swap = swap
        self._names = names
        self._metrics = metrics
        self._alias = alias
        self._backoff_s = backoff_s
        self._turns: dict[Replica, _Turn] = {}
        self.last_error: str | None = None

    @property
    def actual(self) -> Desired:
        """What serves, or is being started."""
        return self._actual

    @property
    def journal(self) -> Journal:
        """What it writes of swaps; closed by who ends the server."""
        return self._journal

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
        self._serves()
        await self._end_cut_off(SwapResult(SwapOutcome.SUCCEEDED))

    async def adopt(self) -> bool:
        """Adopts the engines that an earlier server left; `start` comes next. Whether there was one.

        Where only engines with the version before were left, as by a server that died during a swap, that version
        serves at once, and `run` takes the wish up again.
        """
        desired = self._actual
        if await self._found(desired.target):
            self._serves()
            await self._end_cut_off(SwapResult(SwapOutcome.SUCCEEDED))
            return True
        if desired.previous is None or not await self._found(desired.previous):
            return False
        self._actual = Desired(desired.previous, None, desired.generation - 1)
        self._serves()
        return True

    async def _found(self, target: Target) -> bool:
        try:
            return await self._pool.adopt(target)
        except SvcError:
            log.warning("no engine with %s can be adopted", target, exc_info=True)
            return bool(self._pool.members)

    async def run(self) -> None:
        """Runs until it is cancelled; `start` comes before."""
        while True:
            due = asyncio.create_task(self._due())
            changed = asyncio.create_task(self._changed())
            try:
                done, _ = await asyncio.wait({due, changed}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                due.cancel()
                changed.cancel()
                # Not beside what comes now: it may be ending an engine.
                await asyncio.gather(due, changed, return_exceptions=True)
            try:
                if changed in done:
                    await self._promote(changed.result())
                else:
                    await self._revive(due.result())
            except SQLAlchemyError as error:
                self.last_error = f"the store does not answer: {error}"
                log.exception("the store does not answer; what serves goes on")
                await asyncio.sleep(_STORE_PAUSE_S)

    async def _changed(self) -> Desired:
        while True:
            try:
                found = await asyncio.to_thread(read_desired, self._store, self._actual.name)
                if found is not None and found == self._failed:
                    await self._put_back(found, self._actual)
                elif found is not None and found.generation != self._actual.generation:
                    return found
            except SQLAlchemyError:
                log.exception("the desired state cannot be read; what serves goes on")
                await asyncio.sleep(_STORE_PAUSE_S)
            await asyncio.sleep(_POLL_S)

    async def _due(self) -> Replica:
        """Returns a member without an engine when its turn has come; what is left of the engine was ended."""
        now = asyncio.get_running_loop().time
        while True:
            down = self._pool.down
            self._turns = {engine: turn for engine, turn in self._turns.items() if engine in down}
            for engine in down:
                if engine not in self._turns:
                    died = engine.state is EngineState.FAILED
                    if died:
                        self.last_error = f"replica {engine.replica} died: {engine.why}"
                    self._turns[engine] = _Turn(now() + self._backoff_s[0], 0, died)
                if engine.has_engine:
                    await engine.stop(engine.state)
            first = min(down, key=lambda engine: self._turns[engine].at, default=None)
            wait_s = self._turns[first].at - now() if first else None
            if first and wait_s is not None and wait_s <= 0:
                return first
            await self._pool.changed(wait_s)

    async def _revive(self, engine: Replica) -> None:
        """Starts an engine; where it fails, its next turn comes later than this one did."""
        turn = self._turns[engine]
        if turn.died:
            self._pool.count_restart()
        error = await self._start(engine, self._actual.target)
        if error is None:
            self._serves()
            return
        self.last_error = error
        turn.attempts += 1
        pause_s = self._backoff_s[min(turn.attempts, len(self._backoff_s) - 1)]
        turn.at = asyncio.get_running_loop().time() + pause_s

    async def _promote(self, desired: Desired) -> None:
        before = self._actual
        swap_id = await self._journal.begin(desired)
        report = partial(self._journal.step, swap_id)
        report(f"{before.target} serves, {desired.target} is wanted")
        if desired.forced:
            report(f"it failed a check, and is wanted all the same: {desired.forced}")
        if not self._pool.alive:
            error = await self._start(self._pool.members[0], desired.target)
            result = SwapResult(SwapOutcome.FAILED if error else SwapOutcome.SUCCEEDED, error)
        elif desired.target == before.target:
            result = SwapResult(SwapOutcome.SUCCEEDED)
        else:
            result = await self._swap.run(before.target, desired.target, report)
            self._metrics.swap_ended(result)
        try:
            await self._settle(desired, before, result)
        finally:
            self._journal.end(swap_id, result)

    async def _settle(self, desired: Desired, before: Desired, result: SwapResult) -> None:
        if result.outcome is SwapOutcome.SUCCEEDED:
            self._actual = desired
            self._serves()
            await self._correct_previous(before)
            await self._alias.settled(_ALIAS_WAIT_S)
        else:
            self._failed = desired
            self.last_error = result.reason
            self._serves()
            await self._put_back(desired, before)

    async def _start(self, engine: Replica, target: Target) -> str | None:
        """Starts an engine where none runs; returns why it could not."""
        try:
            await engine.start(target)
        except Exception as error:  # whatever keeps an engine from starting now may be gone later
            log.exception("the engine did not start with %s", target)
            return str(error) if isinstance(error, SvcError) else repr(error)
        return None

    def _serves(self) -> None:
        """Tells everybody what serves now."""
        target = self._actual.target
        self._names.serve(target)
        self._metrics.version_loaded(target)
        self._alias.move(target.version)

    async def _put_back(self, failed: Desired, before: Desired) -> None:
        try:
            self._actual = await asyncio.to_thread(change_desired, self._store, failed, before.target, before.previous)
        except BusyError:
            log.info("somebody promoted again meanwhile; the next turn takes it up")

    async def _correct_previous(self, before: Desired) -> None:
        """Who promotes while another promotion is under way can only guess what will have served before."""
        previous = before.previous if self._actual.target == before.target else before.target
        if self._actual.previous == previous:
            return
        try:
            self._actual = await asyncio.to_thread(
                change_desired, self._store, self._actual, self._actual.target, previous
            )
        except BusyError:
            log.info("somebody promoted again meanwhile; the next turn takes it up")

    async def _end_cut_off(self, result: SwapResult) -> None:
        """Ends the entry of a swap during which a server ended: this start has decided it."""
        last = await asyncio.to_thread(find_swap, self._store, self._actual.name)
        if last is None or last.result is not None:
            return
        if last.generation != self._actual.generation:
            result = SwapResult(SwapOutcome.FAILED, "the server ended during the swap")
        self._journal.step(last.id, f"the server started again with {self._actual.target}")
        self._journal.end(last.id, result)
