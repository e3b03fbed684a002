"""The end of a rollout: the candidate becomes the desired version, and every server swaps to it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sqlalchemy import Engine as Store

from serving.engines.model_names import ModelNames
from serving.rollout.leadership import Leadership
from serving.rollout.store_retry import retrying
from serving.rollout.stored_rollout import StoppedError, StoredRollout
from svc.store.desired import Desired, read_desired
from svc.store.rollouts import RolloutOutcome
from svc.store.swaps import SwapOutcome, SwapResult, find_swap, server_swaps

_POLL_S = 0.25
_RESULT_S = 2.0
"""Seconds that a server may take to record why its swap failed, after it has made the previous version the desired
version again."""


@dataclass(frozen=True, slots=True)
class Switch:
    """Puts a rollout's candidate into production.

    Attributes:
        change_to: function that swaps this server's engines to the candidate.
    """

    store: Store
    stored: StoredRollout
    leadership: Leadership
    names: ModelNames
    change_to: Callable[[Desired], Awaitable[SwapResult]]

    async def begin(self) -> None:
        """Make the candidate the desired version.

        Raises:
            LeaseLostError: another server leads the rollout now.
            StoppedError: a user stopped the rollout, or another version was promoted.
        """
        if why := await self.stored.switch():
            raise StoppedError(RolloutOutcome.CANCELLED, why)

    async def finish(self) -> None:
        """Swap to the candidate, which is already the desired version. The server may have been restarted since the
        candidate became the desired version.

        Raises:
            StoppedError: the swap failed, or another version became the desired version.
        """
        record, generation = self.stored.record, self.stored.record.generation + 1
        while self.names.served != record.target:  # else the server was started with it
            desired = await retrying(read_desired, self.store, record.name)
            if desired is not None and desired.generation == generation:
                if self.names.served is None:  # the first start failed, and is tried again
                    await asyncio.sleep(_POLL_S)
                    continue
                result = await self.change_to(desired)
            else:
                swap = await retrying(find_swap, self.store, record.name, generation, server=self.leadership.server)
                if swap is None or swap.result is None:
                    raise _overtaken(desired)
                result = swap.result
            if result.outcome is SwapOutcome.SUCCEEDED:
                return
            cancelled = result.outcome is SwapOutcome.CANCELLED
            outcome = RolloutOutcome.CANCELLED if cancelled else RolloutOutcome.FAILED
            raise StoppedError(outcome, result.reason or "the swap did not succeed")

    async def await_others(self) -> None:
        """Wait until the other servers have swapped to the candidate too. If the swap fails on one of them, all servers
        return to the previous version.

        Raises:
            LeaseLostError: another server leads the rollout now.
            StoppedError: a swap failed, or another version became the desired version before all servers had swapped.
        """
        record, generation, overtaken_at = self.stored.record, self.stored.record.generation + 1, float("inf")
        while True:
            desired = await retrying(read_desired, self.store, record.name)
            swaps = await retrying(server_swaps, self.store, record.name, generation)
            others = [each for each in swaps if each.running and each.server != self.leadership.server]
            results = [(each.address, each.swap.result if each.swap else None) for each in others]
            for address, result in results:
                if result and result.outcome not in (SwapOutcome.SUCCEEDED, SwapOutcome.CANCELLED):
                    raise StoppedError(RolloutOutcome.FAILED, f"{address}: {result.reason}")
            if all(result and result.outcome is SwapOutcome.SUCCEEDED for _, result in results):
                return
            if desired is None or desired.generation != generation:
                overtaken_at = min(overtaken_at, time.monotonic())
                if time.monotonic() >= overtaken_at + _RESULT_S:
                    raise _overtaken(desired)
            self.stored.require_lead()
            await asyncio.sleep(_POLL_S)


def _overtaken(desired: Desired | None) -> StoppedError:
    return StoppedError(RolloutOutcome.CANCELLED, f"{desired and desired.target} became the desired version")
