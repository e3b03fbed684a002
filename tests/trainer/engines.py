"""Provides engines for qualification without a process: the engine double behind the real client."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from svc.engine.client import EngineClient
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.state import EnginePhase
from svc.errors import EngineError
from tests.serving.engine_double import EngineDouble
from tests.svc.engine.in_process import client_of


class DoubleEngine:
    """An engine that serves the weights of one folder."""

    def __init__(self, double: EngineDouble) -> None:
        self.double = double
        self.loaded_at_start = Path(double.weights).name
        self.client: EngineClient = client_of(double, double.name)
        self.runs = False
        self.capabilities = EngineCapabilities()

    def memory(self) -> int | None:
        """Return a constant amount of memory."""
        return 2**30

    def processor_s(self) -> float:
        """Return 0, because the double has no process."""
        return 0.0

    async def start(self, on_phase: Callable[[EnginePhase], None] = lambda phase: None) -> None:
        """Mark the engine as ready immediately."""
        self.runs = True

    async def wait(self) -> int:
        """Wait until the engine is stopped."""
        while self.runs:
            await asyncio.sleep(0.01)
        return 0

    async def stop(self) -> None:
        """Stop the engine and close its client."""
        self.runs = False
        await self.client.close()


class Engines:
    """Launches engine doubles one after the other.

    Attributes:
        launched: all engines launched so far.
        change: changes a double before it starts, given the number of earlier launches.
        refusals: number of launches that fail.
        reload: whether engines can load other weights in place.
    """

    def __init__(self) -> None:
        self.launched: list[DoubleEngine] = []
        self.change: Callable[[int, EngineDouble], None] = lambda number, double: None
        self.refusals = 0
        self.reload = True

    def __call__(self, folder: Path) -> DoubleEngine:
        if self.refusals:
            self.refusals -= 1
            raise EngineError("vLLM exited with code 1 before it was ready")
        assert not any(engine.runs for engine in self.launched), "two engines would need twice the memory"
        double = EngineDouble(weights=str(folder), name="tiny")
        self.change(len(self.launched), double)
        self.launched.append(DoubleEngine(double))
        self.launched[-1].capabilities = EngineCapabilities(reloads=self.reload)
        return self.launched[-1]

    @property
    def started_with(self) -> list[str]:
        """Return the name of the weights with which each engine started."""
        return [engine.loaded_at_start for engine in self.launched]

    @property
    def running(self) -> int:
        """Return the number of engines that have not been stopped."""
        return sum(engine.runs for engine in self.launched)
