"""Runs `svc serve` with an already running server in place of a vLLM engine.

All work for a request, including the HTTP client, is done by the server's own code. Only the engine's
start, stop and verification are skipped.
"""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

from svc.cli import main
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.state import EnginePhase
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.process import EngineProcess


class UpstreamEngine(EngineProcess):
    """An engine whose socket is linked to a server managed elsewhere.

    Args:
        upstream: socket of that server.
    """

    def __init__(self, upstream: Path, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._upstream = upstream

    @property
    def capabilities(self) -> EngineCapabilities:
        """Return capabilities without probing, because there is no model whose probabilities could be compared."""
        return replace(super().capabilities, unprobed="this is the benchmark's engine")

    async def start(self, on_phase: Callable[[EnginePhase], None] = lambda phase: None) -> None:
        """Link the engine's socket to the running server."""
        self.plan = (await asyncio.to_thread(lambda: self.spec.plan)).rows()
        self.spec.socket.unlink(missing_ok=True)
        self.spec.socket.symlink_to(self._upstream)

    async def wait(self) -> int | None:
        """Wait forever, because this engine never exits."""
        await asyncio.Event().wait()
        return None


if __name__ == "__main__":
    upstream = Path(sys.argv.pop(1))
    with (
        patch("serving.engines.slots.EngineProcess", partial(UpstreamEngine, upstream)),
        patch("serving.engines.slots.shortage", lambda specs: None),  # these engines take no memory
    ):
        main()
