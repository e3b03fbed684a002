"""A double of a Ray cluster, whose actors run in the test's event loop, and of the engines that they start."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

from serving.engines.ray.cluster import RayCluster
from serving.engines.ray.identity import make_identity
from serving.engines.ray.link import Placed
from serving.engines.ray.node import EngineNode
from svc.engine.device import DeviceCapabilities
from svc.engine.state import EnginePhase
from svc.engine.vllm.launch import EngineSpec
from svc.errors import EngineError
from svc.ray.need import Need
from tests.serving.engine_double import EngineDouble, running_engine
from tests.svc.engine.devices import AVX512

HOST = "127.0.0.1"


class ProcessDouble:
    """Stands in for `EngineProcess`: runs an `EngineDouble` in this process.

    Attributes:
        failure: error with which the next start fails.
    """

    failure: Exception | None = None

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.double = EngineDouble(weights=str(spec.model), name=spec.served_name)
        self.plan: list[dict[str, Any]] | None = None
        self._stack = AsyncExitStack()
        self._ended = asyncio.Event()
        self.slept = False

    @property
    def address(self) -> Path:
        return self.spec.socket

    async def start(self, on_phase: Callable[[EnginePhase], None]) -> None:
        """Start the double."""
        on_phase(EnginePhase.WEIGHTS)
        if self.failure:
            raise self.failure
        await self._stack.enter_async_context(running_engine(self.double, self.spec.socket))
        self.plan = [{"name": "device", "value": "cpu", "origin": "setting", "reason": ""}]

    def die(self) -> None:
        """Exit, as a process that was killed."""
        self.double.die()
        self._ended.set()

    async def wait(self) -> int | None:
        """Wait for the double's end."""
        await self._ended.wait()
        return -9

    async def stop(self) -> None:
        """Stop the double."""
        await self._stack.aclose()
        self.spec.socket.unlink(missing_ok=True)
        self._ended.set()

    async def sleep(self) -> None:
        """Note the sleep."""
        self.slept = True

    async def wake(self) -> None:
        """Note the end of the sleep."""
        self.slept = False

    def memory(self) -> int | None:
        """Return a fixed figure."""
        return 2**30

    def processor_s(self) -> float:
        """Return a fixed figure."""
        return 3.0

    def front_s(self) -> float | None:
        """Return a fixed figure."""
        return 1.0


class ClusterDouble(RayCluster):
    """A cluster of one machine, which is this one.

    Attributes:
        engines: engine of each actor that ever started one, by the actor's name.
        running: tasks of the running actors, by name.
        ended: names of the actors that were ended through Ray.
        away: whether no actor can be ended.
        machine: capabilities of the machine.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("double")
        vars(self).update(folder=folder, engines={}, running={}, ended=[], away=False, machine=AVX512, failure=None)
        vars(self).update(loop=asyncio.get_running_loop())

    folder: Path
    engines: dict[str, ProcessDouble]
    running: dict[str, "asyncio.Task[None]"]
    ended: list[str]
    away: bool
    machine: DeviceCapabilities
    failure: Exception | None
    loop: asyncio.AbstractEventLoop

    async def place(self, name: str, need: Need, folder: str, peer: str, timeout_s: float) -> Placed:
        """Run an actor."""
        identity = make_identity()

        def make(spec: EngineSpec) -> Any:
            engine = self.engines[name] = ProcessDouble(spec)
            engine.failure = self.failure
            return engine

        node = EngineNode(
            name,
            self.folder,
            HOST,
            identity,
            peer,
            capabilities=lambda folder: self.machine,
            make=make,
        )
        listener, port = await node.listen()

        async def run() -> None:
            try:
                await node.finished()
            finally:
                listener.close()
                await node.close()

        self.running[name] = asyncio.create_task(run())
        return Placed(host=HOST, port=port, certificate=identity.certificate)

    def end(self, *names: str) -> None:
        """Kill actors, and their engines with them. Called in a thread other than the event loop's."""
        if self.away:
            raise EngineError("cannot connect to the Ray cluster double")
        self.ended.extend(names)
        for name in names:
            asyncio.run_coroutine_threadsafe(self.kill(name), self.loop).result()

    async def kill(self, name: str) -> None:
        """Kill an actor, and its engine with it, as the loss of its machine does."""
        task = self.running.pop(name, None)
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            if name in self.engines:
                await self.engines[name].stop()

    async def close(self) -> None:
        """Kill all actors."""
        for name in list(self.running):
            await self.kill(name)


def no_room() -> EngineError:
    return EngineError("no machine in the Ray cluster had capacity")
