"""`svc serve` as it is, but for its engine: in place of a vLLM that it starts, a server that runs already.

Whatever is done for a request, and with which clients, is the server's own code; only an engine's start, end and
verification are left out.
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
    """The engine's own socket leads to a server that nobody starts or ends here.

    Args:
        upstream: that server's socket.
    """

    def __init__(self, upstream: Path, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._upstream = upstream

    @property
    def capabilities(self) -> EngineCapabilities:
        """It has no model whose probabilities could be compared."""
        return replace(super().capabilities, unprobed="it is the benchmark's")

    async def start(self, on_phase: Callable[[EnginePhase], None] = lambda phase: None) -> None:
        """It runs already."""
        self.plan = (await asyncio.to_thread(lambda: self.spec.plan)).rows()
        self.spec.socket.unlink(missing_ok=True)
        self.spec.socket.symlink_to(self._upstream)

    async def wait(self) -> int | None:
        """It never ends."""
        await asyncio.Event().wait()
        return None


if __name__ == "__main__":
    upstream = Path(sys.argv.pop(1))
    with patch("serving.replicas.slots.EngineProcess", partial(UpstreamEngine, upstream)):
        main()
