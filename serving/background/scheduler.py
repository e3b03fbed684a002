"""Background requests, the server's own, to its engine: one at a time, slowly, and behind the requests of clients.

They go straight to the engine's socket and not through the gateway, so that nothing of them is in the rows and metrics
of requests; vLLM's own metrics and log have them. What is asked, and what the answers are for, others know.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from serving.admission.admission import Admission
from serving.admission.background_slot import BackgroundSlotEndedError
from serving.replicas.pool import EnginePool
from serving.replicas.replica import LoadedWeights
from svc.engine.client import EngineClient
from svc.engine.state import EngineState
from svc.errors import EngineError
from svc.settings import HoldoutSettings

log = logging.getLogger(__name__)

Result = TypeVar("Result")

ID_PREFIX = "holdout-"
PATIENCE_S = 30.0
"""Longest wait of a background request for an idle engine; after it, the request runs beside others. 200 held-out
examples then take less than two hours of the six between two runs."""
_POLL_S = 1.0
_MOST_DEATHS = 3
_DEATHS_WITHIN_S = 24 * 3600.0
"""An engine may die during a background request for any reason. Three times in a day are no accident that clients
should pay for: a request that kills is sent to each new engine again, within minutes."""
_WITH_ENGINE = {EngineState.READY, EngineState.DRAINING, EngineState.SWAPPING}


class SupersededError(Exception):
    """The engine was loaded again since the request was sent, or takes none any more."""


class BackgroundScheduler:
    """Where those who ask get their turn."""

    def __init__(self, admission: Admission, pool: EnginePool, settings: HoldoutSettings) -> None:
        self._admission = admission
        self._pool = pool
        self._settings = settings
        self._turn = asyncio.Lock()
        self._next_at = 0.0
        self._deaths: deque[float] = deque(maxlen=_MOST_DEATHS)
        self._given_up: str | None = None

    @property
    def unfit(self) -> str | None:
        """Why the engine that would be asked cannot be; None where it can, or there is none."""
        primary = self._pool.primary
        able = primary.capabilities if primary else None
        return able.unprobed if able else None

    @property
    def off(self) -> str | None:
        """Why nothing is asked here; None where it is."""
        return self._given_up or self.unfit

    async def ask(self, weights: LoadedWeights, send: Callable[[EngineClient], Awaitable[Result]]) -> Result:
        """Asks when it is its turn; again, where it was cut off and the engine still holds what it held.

        Args:
            weights: what the engine must hold.
            send: sends the request and reads the answer.

        Raises:
            SupersededError: the engine was loaded again since, or killed too often by such requests.
            EngineError: the engine refused, or did not answer and lives.
        """
        async with self._turn:
            while True:
                await asyncio.sleep(max(0.0, self._next_at - time.monotonic()))
                try:
                    async with self._admission.background_slot.take(PATIENCE_S):
                        primary = self._pool.primary
                        if primary is None or primary.weights != weights or self.off:
                            raise SupersededError
                        self._next_at = time.monotonic() + 60 / self._settings.requests_per_minute
                        client = primary.client.with_ids(ID_PREFIX)
                        with primary.occupied():
                            return await send(client)
                except BackgroundSlotEndedError:
                    if self._admission.unavailable_reason is not None:  # and not for a swap
                        self._count_death()
                except EngineError:
                    if await self._lives(client):
                        raise
                    if await self._died(weights, client):
                        self._count_death()

    async def _lives(self, client: EngineClient) -> bool:
        return self._pool.state in _WITH_ENGINE and await client.healthy()

    async def _died(self, weights: LoadedWeights, client: EngineClient) -> bool:
        """Whether the replica, which is more patient, finds the engine dead too; it may only be slow."""
        while self._pool.weights == weights and self._pool.state in _WITH_ENGINE:
            if await client.healthy():
                return False
            await asyncio.sleep(_POLL_S)
        return self._pool.weights == weights or self._pool.weights.fresh

    def _count_death(self) -> None:
        now = time.monotonic()
        self._deaths.append(now)
        recent = sum(now - at < _DEATHS_WITHIN_S for at in self._deaths)
        log.warning("the engine died during a background request, %d of %d", recent, _MOST_DEATHS)
        if recent >= _MOST_DEATHS:
            self._given_up = f"the engine died {recent} times in a day during such a request; see its log"
            log.error("no more background requests: %s", self._given_up)
