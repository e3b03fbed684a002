"""The engine port: the operations of an engine. svc.engine.vllm.process implements it for vLLM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from svc.engine.client import EngineClient
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.state import EnginePhase


class Engine(Protocol):
    """One engine as its callers see it: a local process, or a remote service."""

    @property
    def client(self) -> EngineClient:
        """Client for the server's own requests."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities, known before the start."""

    def memory(self) -> int | None:
        """Return the main memory that the engine's processes use, bytes; None if unknown."""

    def processor_s(self) -> float:
        """Return the processor time that the engine's processes have used, seconds; 0 if unknown."""

    async def start(self, on_phase: Callable[[EnginePhase], None] = ...) -> None:
        """Start the engine; return as soon as it answers requests."""

    async def wait(self) -> int | None:
        """Wait until the engine has exited and return its exit code; None if unknown."""

    async def stop(self) -> None:
        """Stop the engine, unless it has exited."""


class LastingEngine(Engine, Protocol):
    """An engine that answers clients, outlives its server, and can be adopted by the next."""

    @property
    def socket(self) -> Path:
        """The unix socket on which it answers clients, after its start or adoption."""

    @property
    def plan(self) -> list[dict[str, Any]] | None:
        """Choices for the engine's launch, for display: one JSON object each; None before the start."""

    def front_s(self) -> float | None:
        """Return the processor time of the process that answers HTTP, seconds; None if unknown."""

    async def orphan_holds(self) -> str | None:
        """Return the content of an engine that an earlier server left running with the same launch, or None."""

    async def adopt(self) -> None:
        """Adopt the engine of `orphan_holds` instead of starting one."""

    async def record(self, holds: str | None) -> None:
        """Record the loaded content for a later server; None if unknown.

        Raises:
            OSError: the record cannot be written.
        """

    async def sleep(self) -> None:
        """Free the engine's GPU, if its capabilities include that. Send no request until `wake` has returned.

        Raises:
            EngineError: the engine could not be put to sleep, and is no longer usable.
        """

    async def wake(self) -> None:
        """Restore the engine on its GPU; afterwards the caller must verify its content.

        Raises:
            EngineError: the engine could not be woken, and is no longer usable.
        """

    async def leave(self) -> None:
        """Detach from the engine and leave it running, for a later server."""
