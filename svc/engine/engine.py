"""The interface of an engine. It is implemented for vLLM by svc.engine.vllm.process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from svc.engine.address import EngineAddress
from svc.engine.client import EngineClient
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.state import EnginePhase


class Engine(Protocol):
    """An engine as seen by its callers. It may be a local process or a remote service."""

    @property
    def client(self) -> EngineClient:
        """Client for the server's own requests to the engine."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """Capabilities of the engine, which are known even before it starts."""

    def memory(self) -> int | None:
        """Return the main memory used by the engine's processes, in bytes, or None if it is unknown."""

    def processor_s(self) -> float:
        """Return the CPU time used by the engine's processes, in seconds, or 0 if it is unknown."""

    async def start(self, on_phase: Callable[[EnginePhase], None] = ...) -> None:
        """Start the engine and wait until it accepts requests."""

    async def wait(self) -> int | None:
        """Wait for the engine to exit, and return its exit code, or None if that is unknown."""

    async def stop(self) -> None:
        """Stop the engine if it is still running."""


class LastingEngine(Engine, Protocol):
    """An engine that serves clients, outlives its server, and can be adopted by the next server."""

    @property
    def address(self) -> EngineAddress:
        """The address at which the engine serves clients once it has been started or adopted."""

    @property
    def plan(self) -> list[dict[str, Any]] | None:
        """The engine's launch options as JSON objects for display, or None if it has not started yet."""

    def front_s(self) -> float | None:
        """Return the CPU time of the process that serves HTTP, in seconds, or None if it is unknown."""

    async def orphan_holds(self) -> str | None:
        """Look for an engine that an earlier server left running with the same launch options.

        Return the identity of its loaded weights, or None if there is no such engine or its weights are unknown.
        """

    async def adopt(self) -> None:
        """Adopt the engine found by `orphan_holds` instead of starting a new one."""

    async def fetch(self, folder: Path) -> None:
        """Copy a model folder to the engine's machine, if that is a different machine, so that a reload is fast.

        Raises:
            SvcError: the files could not be copied.
        """

    async def record(self, holds: str | None) -> None:
        """Record which weights the engine has loaded, so that a later server can adopt the engine. Pass None if the
        weights are unknown.

        Raises:
            OSError: the record cannot be written.
        """

    async def sleep(self) -> None:
        """Free the engine's GPU, if the engine supports this. Send no requests until `wake` has returned.

        Raises:
            EngineError: the engine could not be put to sleep and is no longer usable.
        """

    async def wake(self) -> None:
        """Wake the engine and move its weights back to its GPU. The caller must then verify the loaded weights.

        Raises:
            EngineError: the engine could not be woken up and is no longer usable.
        """

    async def leave(self) -> None:
        """Detach from the engine and leave it running, so that a server that starts later can adopt it."""
