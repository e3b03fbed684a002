"""Provides engines as a replica sees them: doubles behind a Unix socket that tests start, stop and kill."""

import asyncio
import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from serving.engines.served_model import ServedModel
from serving.engines.slots import EngineSlots, Served
from svc.engine.client import EngineClient
from svc.engine.device import DeviceCapabilities
from svc.engine.engine import LastingEngine
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.probes import EngineFacts
from svc.engine.state import EnginePhase
from svc.errors import EngineError
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.version import Target
from tests.serving.engine_double import EngineDouble
from tests.serving.socket_server import SocketServer
from tests.serving.versions import FACTS

KILLED = 137


PLAN: list[dict[str, Any]] = [{"name": "threads", "value": 2, "origin": "machine", "reason": "2 cores of this process"}]


class EnginePark:
    """Launches doubles, each on its replica's socket. A later server can adopt a running double.

    Args:
        sockets: folder that contains the doubles' sockets.

    Attributes:
        prepare: sets up each new double before it starts.
        failing_starts: how many of the next starts fail.
        start_delay_s: seconds for a start.
        engines: all engines launched so far.
        left: engines that a server left running, by replica.
        ended: replicas whose orphans were stopped.
        room: why there is not enough memory for another engine next to a running one, or None if there is.
        shortage: returns why there is not enough memory for a given number of additional engines.
        facts: engine facts reported for all engines.
        unable: replicas that do not start.
        disk_full: whether writes fail.
        reloads, unprobed, sleeps: see svc.engine.engine_capabilities.
        starting, most_starting: number of engines that are starting now, and the largest number that ever
            started together.
    """

    def __init__(self, sockets: Path) -> None:
        self.sockets = sockets
        self.prepare: Callable[[EngineDouble], None] = lambda double: None
        self.failing_starts = 0
        self.start_delay_s = 0.0
        self.engines: list[DoubleEngine] = []
        self.left: dict[int, DoubleEngine] = {}
        self.ended: list[int] = []
        self.room: str | None = None
        self.shortage: Callable[[int], str | None] = lambda more: self.room if self.alive else None
        self.facts = FACTS
        self.unable: set[int] = set()
        self.disk_full = False
        self.starting = self.most_starting = 0
        self.reloads = True
        self.unprobed: str | None = None
        self.sleeps = False

    def capabilities(self, model: ServedModel | None = None) -> EngineCapabilities:
        """Return the capabilities of an engine launched now."""
        adapters = model.lora.max_loaded if model and model.lora else 0
        return EngineCapabilities(self.reloads, adapters, self.unprobed, self.sleeps)

    @property
    def double(self) -> EngineDouble:
        """Return the double that was launched last."""
        return self.engines[-1].double

    @property
    def alive(self) -> int:
        """Return the number of running engines."""
        return sum(engine.alive for engine in self.engines)

    @property
    def asleep(self) -> int:
        """Return the number of running engines that have freed their GPU."""
        return sum(engine.alive and engine.double.asleep for engine in self.engines)


class ParkSlots(EngineSlots):
    """The park's engines for one server. This is the only component that differs from `svc serve`."""

    def __init__(
        self, park: EnginePark, settings: Settings, registry: Registry, capabilities: DeviceCapabilities, served: Served
    ) -> None:
        super().__init__(settings, registry, capabilities, served)
        self._park = park

    def engine(self, number: int, name: str, model: ServedModel) -> LastingEngine:
        """Return a new engine that has not been started."""
        return DoubleEngine(self._park, number, name, model)

    def numbers(self) -> list[int]:
        """Return the replica numbers of engines that a server left running."""
        return sorted(self._park.left)

    def end(self, number: int) -> None:
        """Stop an engine that a server left running."""
        self._park.ended.append(number)
        self._park.left.pop(number).kill()

    async def shortage(self, engines: Mapping[Target, int]) -> str | None:
        """Return why there is not enough memory for more engines, or None if there is."""
        return await asyncio.to_thread(self._park.shortage, sum(engines.values()))

    def capabilities(self, target: Target) -> EngineCapabilities:
        """Return the capabilities of an engine launched now."""
        return self._park.capabilities()

    def facts(self, name: str, folder: Path) -> EngineFacts:
        """Return the same engine facts for all engines."""
        return self._park.facts


class DoubleEngine:
    """An engine of the park that uses a version's folder as its weights."""

    def __init__(self, park: EnginePark, replica: int, name: str, model: ServedModel) -> None:
        self._park = park
        self.replica = replica
        self.model = model
        self.address = park.sockets / f"engine-{replica}.sock"
        self.holds: str | None = None
        self.double = EngineDouble(weights=str(model.folder), name=name, label=lambda folder: Path(folder).parent.name)
        park.prepare(self.double)
        self.double.die = self.kill
        self.client = EngineClient.of(self.address, name)
        self.plan: list[dict[str, Any]] | None = PLAN
        self.server: SocketServer | None = None
        self.ended = asyncio.Event()
        self.alive = False
        self.capabilities = park.capabilities(model)
        self.stops = 0
        self.worked_s: float | None = None

    def memory(self) -> int | None:
        """Return None, because there is no process."""
        return None

    def processor_s(self) -> float:
        """Return 0, because there is no process."""
        return 0.0

    def front_s(self) -> float | None:
        """Return the double's CPU time, as set by a test."""
        return self.worked_s

    async def start(self, on_phase: Callable[[EnginePhase], None] = lambda phase: None) -> None:
        """Start the double and return once it responds."""
        self._park.engines.append(self)
        on_phase(EnginePhase.WEIGHTS)
        self.alive = True
        self._park.starting += 1
        self._park.most_starting = max(self._park.most_starting, self._park.starting)
        try:
            await asyncio.sleep(self._park.start_delay_s)
        finally:
            self._park.starting -= 1
        if self._park.failing_starts > 0 or self.replica in self._park.unable:
            self._park.failing_starts = max(0, self._park.failing_starts - 1)
            self.kill()
            raise EngineError("vLLM exited with code 1 before it was ready: no memory")
        server = SocketServer(self.double, self.address)
        try:
            await server.start()
        finally:  # it listens, even if the start was cancelled
            self.server = server
            if not self.alive:  # killed during the start
                server.kill()

    async def orphan_holds(self) -> str | None:
        """Return the version held by the engine that was left running."""
        orphan = self._park.left.get(self.replica)
        return orphan.holds if orphan and orphan.alive else None

    async def adopt(self) -> None:
        """Take over the engine that was left running."""
        orphan = self._park.left.pop(self.replica)
        self.double, self.server, self.ended, self.alive = orphan.double, orphan.server, orphan.ended, True
        self.double.die = self.kill
        orphan.alive = False
        self._park.engines.append(self)

    async def fetch(self, folder: Path) -> None:
        """Do nothing, because the double reads no files."""

    async def record(self, holds: str | None) -> None:
        """Record the version that the engine holds."""
        if self._park.disk_full:
            raise OSError(errno.ENOSPC, "no space left on device")
        self.holds = holds

    async def sleep(self) -> None:
        """Put the engine to sleep, which frees the GPU."""
        await self.client.sleep()

    async def wake(self) -> None:
        """Wake the engine, which takes the GPU again."""
        await self.client.wake()

    async def leave(self) -> None:
        """Leave the engine running when the server stops."""
        if self.alive:
            self._park.left[self.replica] = self
        await self.client.close()

    def kill(self) -> None:
        """Stop the engine as SIGKILL would."""
        self.double.dead = True
        self.alive = False
        if self.server:
            self.server.kill()
        self.ended.set()

    async def wait(self) -> int:
        """Wait until the engine exits, and return its exit code."""
        await self.ended.wait()
        return KILLED

    async def stop(self) -> None:
        """Stop the engine if it is running."""
        self.stops += 1
        self.kill()
        if self.server:
            await self.server.stop()
        await self.client.close()


def fail_to_end_once(monkeypatch: pytest.MonkeyPatch) -> list[OSError]:
    """Make the next engine stop fail. The returned list is empty afterwards."""
    stop, failures = DoubleEngine.stop, [OSError("too many open files")]

    async def stopping(engine: DoubleEngine) -> None:
        if failures:
            raise failures.pop()
        await stop(engine)

    monkeypatch.setattr(DoubleEngine, "stop", stopping)
    return failures
