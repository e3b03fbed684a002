"""The engine port: the operations of an engine. svc.engine.vllm.process implements it for vLLM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from svc.engine.client import EngineClient
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.state import EnginePhase


class Engine(Protocol):
    """An engine for its users: a local process, or something remote."""

    @property
    def client(self) -> EngineClient:
        """Client for the server's own requests."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities, known before the start."""

    def memory(self) -> int | None:
        """Return the main memory that its processes use, bytes; None if unknown."""

    def processor_s(self) -> float:
        """Return the processor time that its processes have used, seconds; 0 if unknown."""

    async def start(self, on_phase: Callable[[EnginePhase], None] = ...) -> None:
        """Start the engine; return when it answers."""

    async def wait(self) -> int | None:
        """Wait until it has exited and return its exit code; None if unknown."""

    async def stop(self) -> None:
        """Stop it, if it has not exited."""


class LastingEngine(Engine, Protocol):
    """An engine that answers clients, outlives its server, and can be adopted by the next."""

    @property
    def socket(self) -> Path:
        """The unix socket on which it answers clients, after its start or adoption."""

    @property
    def plan(self) -> list[dict[str, Any]] | None:
        """Choices for its launch, for people: one JSON object each; None before the start."""

    def front_s(self) -> float | None:
        """Return the processor time of the process that answers HTTP, seconds; None if unknown."""

    async def orphan_holds(self) -> str | None:
        """Return the content of an engine with the same launch that an earlier server left running, or None."""

    async def adopt(self) -> None:
        """Adopt that engine instead of a start."""

    async def record(self, holds: str | None) -> None:
        """Record its content for a later server; None if unknown.

        Raises:
            OSError: the record cannot be written.
        """

    async def sleep(self) -> None:
        """Free its GPU, if its capabilities include that. No request may reach it until it is awake.

        Raises:
            EngineError: it does not sleep, and is not usable any more.
        """

    async def wake(self) -> None:
        """Restore it on its GPU; the caller must verify its content then.

        Raises:
            EngineError: it does not wake, and is not usable any more.
        """

    async def leave(self) -> None:
        """Detach from it and let it run, for a later server."""
