"""The port: what an engine can do, for whoever uses one: a process here (svc.engine.vllm.process), or another."""

from collections.abc import Callable
from typing import Protocol

from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.vllm.client import EngineClient
from svc.engine.vllm.connection_pool import EngineConnections
from svc.engine.vllm.plan import EnginePlan
from svc.engine.vllm.startup_phase import EnginePhase


class Engine(Protocol):
    """What a user of an engine needs of it; a process here, or something elsewhere."""

    @property
    def client(self) -> EngineClient:
        """For what we ask it ourselves."""

    @property
    def plan(self) -> EnginePlan | None:
        """How it was started; None before."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """What it can do; known before it starts."""

    def memory(self) -> int | None:
        """Bytes that its processes hold of the machine's memory; None where that cannot be known."""

    def processor_s(self) -> float:
        """Return the processor time that its processes have used, seconds; 0 where that cannot be known."""

    async def start(self, on_phase: Callable[[EnginePhase], None] = ...) -> None:
        """Returns when it answers."""

    async def wait(self) -> int | None:
        """Returns its exit code when it has ended; None where it cannot be known."""

    async def stop(self) -> None:
        """Ends it, if it has not ended."""


class LastingEngine(Engine, Protocol):
    """One that answers clients, outlives its server, and is adopted by the next."""

    @property
    def http(self) -> EngineConnections:
        """For the requests of clients. Closed when the engine is stopped or left."""

    def front_s(self) -> float | None:
        """Return the processor time that the process which answers HTTP has used, seconds; None if unknown."""

    async def orphan_holds(self) -> str | None:
        """What an engine holds that was started alike by an earlier server and runs still; None where none does."""

    async def adopt(self) -> None:
        """Takes that engine in place of a start."""

    async def record(self, holds: str | None) -> None:
        """Writes down what it holds, for a server that comes later; None while nobody knows.

        Raises:
            OSError: that cannot be written down.
        """

    async def sleep(self) -> None:
        """Frees its GPU; of one whose capabilities say so. No request may reach it until it is awake.

        Raises:
            EngineError: it does not sleep, and is of no more use.
        """

    async def wake(self) -> None:
        """Takes its GPU again; what it holds then is to be verified.

        Raises:
            EngineError: it does not wake, and is of no more use.
        """

    async def leave(self) -> None:
        """Lets it run, for a later server."""
