"""Adjusts a model's number of replicas to its load, within the limits of `engine.replicas`.

A new replica is a pool member without an engine; the reviver starts and verifies the engine, as for any other member. A
removed replica first completes its running requests. Nothing changes during a swap or a rollout, or while the model is
idle.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from serving.engines.pool import EnginePool
from serving.rollout.scaling import ScalingPolicy
from svc.engine.state import EngineState
from svc.errors import SvcError
from svc.version import Target

log = logging.getLogger(__name__)

_INTERVAL_S = 5.0
_MAX_REFUSED_PAUSE_S = 60.0
"""Longest pause, in seconds, after a replica could not be added. Each query to a Ray cluster runs in a process that
takes 2 to 3 s of CPU time."""
_NOT_STARTED = {EngineState.STOPPED, EngineState.STARTING, EngineState.FAILED}


@dataclass(eq=False, kw_only=True)
class ReplicaScaling:
    """Adds and removes replicas of one model.

    Attributes:
        policy: decides the number of replicas.
        target: function that returns the version in production.
        changing: function that returns whether a swap or a rollout is in progress.
        clock: function that returns the time in seconds.
        refused: reason why a replica that the load requires cannot be added, or None.
    """

    policy: ScalingPolicy
    pool: EnginePool
    target: Callable[[], Target]
    changing: Callable[[], bool]
    clock: Callable[[], float] = time.monotonic
    refused: str | None = field(default=None, init=False)
    _pause_s: float = field(default=_INTERVAL_S, init=False)
    _ask_at: float = field(default=0.0, init=False)

    async def run(self) -> None:
        """Adjust the number of replicas to the load every few seconds, until cancelled."""
        self._set_capacity()
        while True:
            await self.step()
            await asyncio.sleep(_INTERVAL_S)

    async def step(self) -> None:
        """Observe the load, and add or remove replicas if necessary."""
        if not self._may_change():
            self.policy.reset()
            return
        wanted = self.policy.wanted(
            self.clock(), self.pool.admission.running + self.pool.admission.queued, self.pool.size
        )
        self.pool.metrics.replicas_wanted(wanted)
        if wanted > self.pool.size:
            await self._add(wanted)
            return
        self._allow()
        if wanted < self.pool.size and self.pool.shrink():
            log.info("%s: the load needs only %d replicas; removing one", self.target(), wanted)
            self._set_capacity()

    def status(self) -> Mapping[str, Any]:
        """Return the limits and the current number of replicas as JSON values."""
        limits = {"min": self.policy.least, "max": self.policy.most}
        return {**limits, "replicas": self.pool.size, "refused": self.refused}

    def _may_change(self) -> bool:
        joining = any(engine.state is not EngineState.RETIRING for engine in self.pool.others)
        return bool(self.pool.ready) and not joining and not self.changing()

    async def _add(self, wanted: int) -> None:
        """Add the replicas that the load requires, or a single replica if there is not enough memory for all of
        them.
        """
        if self.refused and self.clock() < self._ask_at:
            return
        size = self.pool.size
        shortage = await self._shortage(wanted - size)
        if shortage and wanted > size + 1 and await self._shortage(1) is None:
            wanted, shortage = size + 1, None
        if shortage:
            self._refuse(shortage)
        elif self._may_change():  # a swap may have begun meanwhile
            self._allow()
            log.info("%s: scaling up from %d to %d replicas", self.target(), self.pool.size, wanted)
            self.pool.grow(wanted)
            self._set_capacity()

    async def _shortage(self, more: int) -> str | None:
        """Return why these replicas cannot be added, or None if they can."""
        without_memory = sum(member.state in _NOT_STARTED for member in self.pool.members)
        try:
            return await self.pool.slots.shortage({self.target(): more + without_memory})
        except (SvcError, OSError) as error:
            return error.wrong if isinstance(error, SvcError) else str(error)

    def _refuse(self, shortage: str) -> None:
        """Record why no replica was added, and double the pause until the next attempt."""
        if self.refused is None:
            log.warning("%s: cannot add replicas to handle the load; retrying: %s", self.target(), shortage)
        self.refused = shortage
        self._ask_at = self.clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _MAX_REFUSED_PAUSE_S)

    def _allow(self) -> None:
        self.refused, self._pause_s = None, _INTERVAL_S

    def _set_capacity(self) -> None:
        self.pool.admission.set_capacity(self.policy.sequences * self.pool.size)
