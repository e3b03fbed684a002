"""Starts engines for pool members that have none, because their engine died or was never started.

Engines that are being changed are skipped.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.engines.pool import EnginePool
from serving.engines.replica import Replica
from svc.engine.state import EngineState
from svc.errors import SvcError
from svc.version import Target

log = logging.getLogger(__name__)

_ROOM_PAUSE_S = 1.0
_MAX_ROOM_PAUSE_S = 8.0
"""Longest pause between two checks of the free memory, in seconds. A query to a Ray cluster takes 2 to 3 s of CPU
time."""
_BACKOFF_S: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)


@dataclass(slots=True)
class _Turn:
    """The planned engine start for a member that has no engine.

    Attributes:
        at: time of the planned start on the event loop's clock, in seconds.
        attempts: number of failed starts so far.
        refusals: how many times in a row the start has been postponed for lack of memory.
        died: whether the member's engine died, rather than never having been started.
    """

    at: float
    attempts: int
    died: bool
    refusals: int = 0


@dataclass(eq=False)
class Reviver:
    """Starts engines for pool members that have none, one at a time.

    The pause before a member's next start grows with each failure.

    Attributes:
        target: function that returns the version to start engines with. During a swap, this is the previous
            version.
        on_start: function called when a member has an engine again.
        on_error: function called with the reason why a member has no engine.
        backoff_s: pauses before the first, second, ... start after an engine died, in seconds. The last pause
            is repeated.
    """

    pool: EnginePool
    target: Callable[[], Target]
    on_start: Callable[[], None]
    on_error: Callable[[str], None]
    backoff_s: tuple[float, ...] = field(default_factory=lambda: _BACKOFF_S, init=False)
    _turns: dict[Replica, _Turn] = field(default_factory=dict, init=False)

    async def run(self) -> None:
        """Keep starting engines for pool members that have none, until cancelled."""
        while True:
            engine = await self._due()
            async with self.pool.held(engine):
                if engine in self.pool.down and await self._has_room(engine):
                    await self._revive(engine)

    async def _due(self) -> Replica:
        """Wait until a start is due for a member without an engine, and return that member.

        While waiting, this also cleans up after engines that have died.
        """
        now = asyncio.get_running_loop().time
        while True:
            self._note_deaths(now())
            down = [engine for engine in self._turns if not engine.lock.locked()]
            for engine in down:
                if engine.has_engine and not engine.lock.locked():
                    async with self.pool.held(engine):
                        await engine.stop(engine.state)
            first = min(down, key=lambda engine: self._turns[engine].at, default=None)
            wait_s = self._turns[first].at - now() if first else None
            if first and wait_s is not None and wait_s <= 0:
                return first
            await self.pool.changed(wait_s)

    def _note_deaths(self, now: float) -> None:
        down = self.pool.down
        self._turns = {engine: turn for engine, turn in self._turns.items() if engine in down}
        for engine in down:
            # An engine that a swap holds may be dead for a moment; the swap replaces the engine.
            if engine not in self._turns and not engine.lock.locked():
                died = engine.state is EngineState.FAILED
                if died:
                    self.on_error(f"replica {engine.replica} died: {engine.why}")
                self._turns[engine] = _Turn(now + self.backoff_s[0], 0, died)

    async def _has_room(self, engine: Replica) -> bool:
        """Return whether there is enough memory to start the engine. If not, postpone the start.

        During a swap, a second engine or an engine that is being replaced may take up memory. Replicas that were added
        to handle the load may no longer fit when a sleeping model wakes up.
        """
        grown = self.pool.size > self.pool.slots.first_engines(self.target().version.name)
        if not self.pool.others and not grown:
            return True
        try:
            engines = {self.target(): 1 + self.pool.starting}
            shortage = await self.pool.slots.shortage(engines)
        except (SvcError, OSError):
            return True  # the start fails with the same error
        if shortage:
            turn = self._turns[engine]
            pause_s = min(_ROOM_PAUSE_S * 2**turn.refusals, _MAX_ROOM_PAUSE_S)
            log.info("not enough memory for replica %d; waiting %.0f s: %s", engine.replica, pause_s, shortage)
            turn.at, turn.refusals = asyncio.get_running_loop().time() + pause_s, min(turn.refusals + 1, 10)
        return not shortage

    async def _revive(self, engine: Replica) -> None:
        """Start an engine. If that fails, schedule the next attempt with backoff."""
        turn = self._turns[engine]
        if turn.died:
            self.pool.count_restart()
        error = await start_engine(engine, self.target())
        if error is None:
            self.on_start()
            return
        self.on_error(error)
        turn.attempts += 1
        pause_s = self.backoff_s[min(turn.attempts, len(self.backoff_s) - 1)]
        turn.at = asyncio.get_running_loop().time() + pause_s


async def start_engine(engine: Replica, target: Target) -> str | None:
    """Start the engine of a pool member. Return the reason for a failure, or None on success."""
    try:
        await engine.start(target)
    except Exception as error:  # any error: it may be temporary
        log.exception("could not start the engine to serve %s", target)
        return str(error) if isinstance(error, SvcError) else repr(error)
    return None
