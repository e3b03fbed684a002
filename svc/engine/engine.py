"""The engine interface: the operations of an engine. svc.engine.vllm.process implements it for vLLM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from svc.engine.client import EngineClient
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.state import EnginePhase


class Engine(Protocol):
    """One engine as seen by its callers: a local process or a remote service."""

    @property
    def client(self) -> EngineClient:
        """Client for the server's own requests to the engine."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities of the engine, known before it starts."""

    def memory(self) -> int | None:
        """Return the main memory used by the engine's processes in bytes, or None if unknown."""

    def processor_s(self) -> float:
        """Return the processor time used by the engine's processes in seconds, or 0 if unknown."""

    async def start(self, on_phase: Callable[[EnginePhase], None] = ...) -> None:
        """Start the engine, and return as soon as it accepts requests."""

    async def wait(self) -> int | None:
        """Wait until the engine has exited, and return its exit code, or None if unknown."""

    async def stop(self) -> None:
        """Stop the engine if it is still running."""


class LastingEngine(Engine, Protocol):
    """An engine that serves clients, outlives its server, and can be adopted by the next server."""

    @property
    def socket(self) -> Path:
        """The Unix socket on which the engine serves clients once it has been started or adopted."""

    @property
    def plan(self) -> list[dict[str, Any]] | None:
        """The engine's launch choices as JSON objects for display, or None before the start."""

    def front_s(self) -> float | None:
        """Return the processor time of the process that serves HTTP in seconds, or None if unknown."""

    async def orphan_holds(self) -> str | None:
        """Return what is loaded in an engine that an earlier server left running (same launch), or None."""

    async def adopt(self) -> None:
        """Adopt the engine found by `orphan_holds` instead of starting a new one."""

    async def record(self, holds: str | None) -> None:
        """Record what the engine has loaded, for a later server. Pass None if it is unknown.

        Raises:
            OSError: the record cannot be written.
        """

    async def sleep(self) -> None:
        """Free the engine's GPU if its capabilities include that. Send no requests until `wake` has returned.

        Raises:
            EngineError: the engine could not be put to sleep and is no longer usable.
        """

    async def wake(self) -> None:
        """Restore the engine on its GPU. The caller must verify its content afterwards.

        Raises:
            EngineError: the engine could not be woken and is no longer usable.
        """

    async def leave(self) -> None:
        """Detach from the engine and leave it running for a later server."""
