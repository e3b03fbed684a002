"""The engine port: what callers may ask of an engine. svc.engine.vllm.process implements it for vLLM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from svc.engine.client import EngineClient
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.state import EnginePhase


class Engine(Protocol):
    """What a user of an engine needs of it; a process here, or something elsewhere."""

    @property
    def client(self) -> EngineClient:
        """For what we ask it ourselves."""

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
    def socket(self) -> Path:
        """The unix socket on which it answers clients, once it was started or adopted."""

    @property
    def plan(self) -> list[dict[str, Any]] | None:
        """How it was started, for people: a JSON object for each choice; None before."""

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
