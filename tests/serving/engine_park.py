"""Engines as the supervisor sees them: the double behind a unix socket, started, ended and killed at will."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from svc.engine.client import EngineClient
from svc.engine.phase import EnginePhase
from svc.engine.plan import Choice, EnginePlan, Origin
from svc.engine.process import Engine
from svc.errors import EngineError
from tests.serving.engine_double import EngineDouble
from tests.serving.socket_server import SocketServer

KILLED = 137


PLAN = EnginePlan((Choice("threads", 2, Origin.MACHINE, "2 cores of this process"),))


class EnginePark:
    """Launches doubles, one after the other, on one socket.

    Args:
        socket: where they listen.
        name: their model.

    Attributes:
        prepare: sets up each new double before it starts.
        failing_starts: so many of the next starts fail.
        start_delay_s: seconds for a start.
        engines: all that were launched.
    """

    def __init__(self, socket: Path, name: str) -> None:
        self.socket = socket
        self.name = name
        self.prepare: Callable[[EngineDouble], None] = lambda double: None
        self.failing_starts = 0
        self.start_delay_s = 0.0
        self.engines: list[DoubleEngine] = []

    def launch(self, model: Path) -> Engine:
        """A new, unstarted engine."""
        engine = DoubleEngine(self, model)
        self.engines.append(engine)
        return engine

    @property
    def double(self) -> EngineDouble:
        """The one that was launched last."""
        return self.engines[-1].double

    @property
    def alive(self) -> int:
        """How many run."""
        return sum(engine.alive for engine in self.engines)


class DoubleEngine:
    """One engine of the park; a version's folder is its weights."""

    def __init__(self, park: EnginePark, model: Path) -> None:
        self._park = park
        self.double = EngineDouble(weights=str(model), name=park.name, label=lambda folder: Path(folder).parent.name)
        park.prepare(self.double)
        self.double.die = self.kill
        self.client = EngineClient.over_socket(park.socket, park.name)
        self.plan: EnginePlan | None = PLAN
        self._server: SocketServer | None = None
        self._ended = asyncio.Event()
        self.alive = False
        self.stops = 0

    async def start(self, on_phase: Callable[[EnginePhase], None] = lambda phase: None) -> None:
        """Returns when it answers."""
        on_phase(EnginePhase.WEIGHTS)
        self.alive = True
        await asyncio.sleep(self._park.start_delay_s)
        if self._park.failing_starts > 0:
            self._park.failing_starts -= 1
            self.kill()
            raise EngineError("vLLM ended with code 1 before it was ready: no memory")
        self._server = SocketServer(self.double, self._park.socket)
        await self._server.start()

    def kill(self) -> None:
        """Ends it as SIGKILL would."""
        self.double.dead = True
        self.alive = False
        if self._server:
            self._server.kill()
        self._ended.set()

    async def wait(self) -> int:
        """Returns its exit code when it has ended."""
        await self._ended.wait()
        return KILLED

    async def stop(self) -> None:
        """Ends it, if it has not ended."""
        self.stops += 1
        self.kill()
        if self._server:
            await self._server.stop()
        await self.client.close()
