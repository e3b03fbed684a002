"""Keeps one engine alive: starts it with a version, proves it, notices its death.

Decides nothing: what to load, and what to do after a death, is the reconciler's.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serving.hold import Admission
from serving.proof import Proof
from serving.traffic import Traffic
from svc.engine.client import EngineClient
from svc.engine.plan import EnginePlan
from svc.engine.process import Engine
from svc.engine.state import EngineState
from svc.store.desired import Target

log = logging.getLogger(__name__)

_HEALTH_S = 2.0
_UNHEALTHY_S = 30.0
"""The front answers health checks even under load; half a minute without an answer is a death."""


@dataclass(frozen=True, slots=True)
class Load:
    """Weights that were loaded and proven, the same version's as before or another's.

    Attributes:
        number: from 1; 0 before the first.
        fresh: a new engine loaded them; otherwise one that ran.
    """

    number: int
    fresh: bool


class Supervisor:
    """One engine, and what is known of it.

    Args:
        launch: makes a new, unstarted engine for a model folder.
        on_phase: hears what a start is doing.
    """

    def __init__(
        self,
        launch: Callable[[Path], Engine],
        proof: Proof,
        door: Admission,
        traffic: Traffic,
        on_phase: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self._launch = launch
        self._proof = proof
        self._door = door
        self._traffic = traffic
        self._on_phase = on_phase
        self._engine: Engine | None = None
        self.restarts = 0
        self.state = EngineState.STOPPED
        self.load = Load(0, fresh=True)

    @property
    def client(self) -> EngineClient:
        """The client of the engine that runs.

        Raises:
            RuntimeError: none runs.
        """
        if self._engine is None:
            raise RuntimeError("no engine runs")
        return self._engine.client

    @property
    def plan(self) -> EnginePlan | None:
        """How the engine was started; None where none was."""
        return self._engine.plan if self._engine else None

    @property
    def runs(self) -> bool:
        """Whether there is an engine; it may have died a moment ago."""
        return self._engine is not None

    def enter(self, state: EngineState) -> None:
        """Shows a state to metrics and status, and to the door where it decides who may enter."""
        if state is EngineState.READY and self.state is not EngineState.DRAINING:  # as where a swap was given up early
            self.load = Load(self.load.number + 1, fresh=self.state is EngineState.STARTING)
        self.state = state
        self._traffic.engine_state(state)
        match state:
            case EngineState.READY:
                self._door.available()
            case EngineState.STARTING:
                self._door.unavailable("the engine is starting")
            case EngineState.STOPPED | EngineState.FAILED:
                self._door.unavailable(f"the engine has {state}")

    async def start(self, target: Target) -> None:
        """Starts an engine with a version, in place of the one before, and proves it.

        Raises:
            NotFoundError, IntegrityError: the version's files are not there or not right.
            EngineError: it did not start, or runs other weights (ProbeError).
        """
        await self.stop(EngineState.STARTING)
        try:
            self._engine = engine = self._launch(await self._proof.folder(target))
            await self._start_checked(engine, target)
            log.info("%s: %s", target, await self._proof.probes(engine.client, target))
        except BaseException:
            await self.stop(EngineState.FAILED)
            raise
        self.enter(EngineState.READY)

    async def _start_checked(self, engine: Engine, target: Target) -> None:
        """Compares the files' hashes while the engine starts; nobody is served before both are done."""
        starting = asyncio.create_task(engine.start(self._on_phase))
        try:
            await self._proof.files(target)
            await starting
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)

    async def died(self) -> str:
        """Returns why, when the engine has died."""
        engine = self._engine
        if engine is None:
            return "it did not start"
        ended = asyncio.create_task(engine.wait())
        answered = time.monotonic()
        try:
            while True:
                done, _ = await asyncio.wait({ended}, timeout=_HEALTH_S)
                if done:
                    return f"it ended with code {ended.result()}"
                if await engine.client.healthy():
                    answered = time.monotonic()
                elif (silent_s := time.monotonic() - answered) >= _UNHEALTHY_S:
                    return f"no answer to health checks for {silent_s:.0f} s"
        finally:
            ended.cancel()

    async def stop(self, state: EngineState = EngineState.STOPPED) -> None:
        """Ends the engine, if there is one, and enters a state that admits nobody."""
        self.enter(state)
        if self._engine is not None:
            # Forgotten only once it has ended: whoever is cancelled here leaves it to the next call.
            await self._engine.stop()
            self._engine = None

    def count_restart(self) -> None:
        """Counts a start after a death."""
        self.restarts += 1
        self._traffic.engine_restarted()
