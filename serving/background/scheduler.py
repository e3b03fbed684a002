"""Sends the server's own (background) requests to its engine, one at a time and after client requests.

Background requests are sent to the engine's socket directly, bypassing the gateway. Request rows and gateway
metrics therefore do not include them, while vLLM's own metrics and log do. This module knows neither the contents
of the requests nor how the answers are used.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from serving.admission.admission import Admission
from serving.admission.background_slot import BackgroundSlotEndedError
from serving.engines.pool import EnginePool
from serving.engines.replica import LoadedWeights
from svc.engine.client import EngineClient
from svc.engine.state import EngineState
from svc.errors import EngineError
from svc.settings.monitoring import HoldoutSettings

log = logging.getLogger(__name__)

Result = TypeVar("Result")

ID_PREFIX = "holdout-"
PATIENCE_S = 30.0
"""Maximum time that a background request waits for an idle engine, in seconds. After that, the request runs
concurrently with other requests. With this limit, an evaluation of 200 held-out examples takes less than two hours; by
default, an evaluation starts every six hours."""
_POLL_S = 1.0
_MAX_DEATHS = 3
"""Number of times that the engine must die, for any reason, during background requests within `_DEATHS_WITHIN_S` for
background requests to stop. Without this limit, a request that kills the engine would be sent to each new engine within
minutes."""
_DEATHS_WITHIN_S = 24 * 3600.0
_WITH_ENGINE = {EngineState.READY, EngineState.DRAINING, EngineState.SWAPPING}


class SupersededError(Exception):
    """Raised when the engine no longer has the weights that a request is meant for, or background requests are turned
    off."""


class BackgroundScheduler:
    """Sends background requests to the engine, one at a time."""

    def __init__(self, admission: Admission, pool: EnginePool, settings: HoldoutSettings) -> None:
        self._admission = admission
        self._pool = pool
        self._settings = settings
        self._turn = asyncio.Lock()
        self._next_at = 0.0
        self._deaths: deque[float] = deque(maxlen=_MAX_DEATHS)
        self._given_up: str | None = None

    @property
    def unfit(self) -> str | None:
        """Reason why the engine cannot answer background requests, or None if it can or if no engine is running."""
        primary = self._pool.primary
        able = primary.capabilities if primary else None
        return able.unprobed if able else None

    @property
    def off(self) -> str | None:
        """Reason why background requests are turned off, or None if they are on."""
        return self._given_up or self.unfit

    async def ask(self, weights: LoadedWeights, send: Callable[[EngineClient], Awaitable[Result]]) -> Result:
        """Send a request when its turn comes, and resend it if it is interrupted while the same weights stay loaded.

        Args:
            weights: the weights that the engine must have loaded.
            send: function that sends the request and reads the response.

        Raises:
            SupersededError: the engine was reloaded in the meantime, or background requests are turned off.
            EngineError: the engine rejected the request, or is alive but did not respond.
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
                    if self._admission.unavailable_reason is not None:  # the engine died; otherwise it was a swap
                        self._count_death()
                except EngineError:
                    if await self._lives(client):
                        raise
                    if await self._died(weights, client):
                        self._count_death()

    async def _lives(self, client: EngineClient) -> bool:
        return self._pool.state in _WITH_ENGINE and await client.healthy()

    async def _died(self, weights: LoadedWeights, client: EngineClient) -> bool:
        """Return whether the engine died, after waiting until it is healthy or no longer runs these weights.

        A failed request does not prove that the engine died. The engine may just be slow, and its replica waits longer
        before declaring it dead.
        """
        while self._pool.weights == weights and self._pool.state in _WITH_ENGINE:
            if await client.healthy():
                return False
            await asyncio.sleep(_POLL_S)
        return self._pool.weights == weights or self._pool.weights.fresh

    def _count_death(self) -> None:
        now = time.monotonic()
        self._deaths.append(now)
        recent = sum(now - at < _DEATHS_WITHIN_S for at in self._deaths)
        log.warning(
            "the engine died during a background request (deaths in the last day: %d, limit: %d)",
            recent,
            _MAX_DEATHS,
        )
        if recent >= _MAX_DEATHS:
            self._given_up = f"the engine died {recent} times in a day during background requests; see the engine's log"
            log.error("stopping background requests: %s", self._given_up)
