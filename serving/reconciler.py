"""Makes what serves equal to what is desired, and keeps it so: the only task that touches the engine.

One loop: the engine died -> start it again, slower after each failure; the desired version changed -> swap, and where
that fails put the desired state back, so that it always names what truly serves.
"""

import asyncio
import logging
from collections.abc import Callable

from sqlalchemy import Engine as Store

from serving.routing import Routes, Served
from serving.supervisor import Supervisor
from serving.swap import InPlaceSwap
from serving.traffic import Traffic
from svc.engine.state import EngineState
from svc.errors import BusyError, SvcError
from svc.registry.registry import Registry
from svc.registry.version import Alias
from svc.store.desired import Desired, change_desired, read_desired
from svc.store.swaps import SwapOutcome, add_step, begin_swap, end_swap

log = logging.getLogger(__name__)

_POLL_S = 0.25
_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)


class Reconciler:
    """Owns the engine's fate.

    Args:
        desired: what shall serve when the server starts.
    """

    def __init__(
        self,
        desired: Desired,
        *,
        registry: Registry,
        store: Store,
        supervisor: Supervisor,
        swap: InPlaceSwap,
        routes: Routes,
        traffic: Traffic,
        backoff_s: tuple[float, ...] = _BACKOFF_S,
    ) -> None:
        self._actual = desired
        self._registry = registry
        self._store = store
        self._supervisor = supervisor
        self._swap = swap
        self._routes = routes
        self._traffic = traffic
        self._backoff_s = backoff_s
        self.last_error: str | None = None

    @property
    def actual(self) -> Desired:
        """What serves, or is being started."""
        return self._actual

    async def start(self) -> None:
        """Starts the engine with the desired version.

        Raises:
            SvcError: it cannot serve; at the first start a person is there to read it.
        """
        await self._supervisor.start(self._actual.target)
        await self._serves()

    async def run(self) -> None:
        """Runs until it is cancelled; `start` comes before."""
        while True:
            died = asyncio.create_task(self._supervisor.died())
            changed = asyncio.create_task(self._changed())
            try:
                await asyncio.wait({died, changed}, return_when=asyncio.FIRST_COMPLETED)
                if died.done():
                    await self._revive(died.result())
                elif changed.done():
                    await self._promote(changed.result())
            finally:
                died.cancel()
                changed.cancel()

    async def _changed(self) -> Desired:
        while True:
            found = await asyncio.to_thread(read_desired, self._store, self._actual.name)
            if found and found.generation != self._actual.generation:
                return found
            await asyncio.sleep(_POLL_S)

    async def _revive(self, why: str) -> None:
        """Starts the engine again until it serves; waits longer after each failure."""
        log.error("the engine died: %s", why)
        self.last_error = f"the engine died: {why}"
        attempt = 0
        while True:
            await self._supervisor.stop(EngineState.STARTING)
            await asyncio.sleep(self._backoff_s[min(attempt, len(self._backoff_s) - 1)])
            self._supervisor.count_restart()
            try:
                await self._supervisor.start(self._actual.target)
            except SvcError as error:
                log.exception("the engine did not come back")
                self.last_error = str(error)
                attempt += 1
            else:
                await self._serves()
                return

    async def _promote(self, desired: Desired) -> None:
        before = self._actual
        if desired.target == before.target:
            self._actual = desired
            return
        swap_id = await asyncio.to_thread(begin_swap, self._store, desired)
        report = self._reporter(swap_id)
        report(f"{before.target} serves, {desired.target} is wanted")
        result = await self._swap.run(before.target, desired.target, report)
        if result.outcome is SwapOutcome.SUCCEEDED:
            self._actual = desired
            await self._serves()
        else:
            self._actual = await asyncio.to_thread(self._put_back, desired, before)
            self.last_error = result.reason
        self._traffic.swap_ended(result)
        await asyncio.to_thread(end_swap, self._store, swap_id, result)

    async def _serves(self) -> None:
        """Tells everybody what serves now."""
        target = self._actual.target
        served = Served(target.version, target.format)
        self._routes.serve(served)
        self._traffic.version_loaded(served)
        await asyncio.to_thread(self._registry.tracking.set_alias, target.version, Alias.PRODUCTION)

    def _put_back(self, failed: Desired, before: Desired) -> Desired:
        try:
            return change_desired(self._store, failed, before.target, before.previous)
        except BusyError:
            # Somebody promoted again meanwhile: what serves is unchanged, and the loop's next turn sees the new wish.
            return before

    def _reporter(self, swap_id: int) -> Callable[[str], None]:
        def report(text: str) -> None:
            log.info("swap %d: %s", swap_id, text)
            add_step(self._store, swap_id, text)

        return report
