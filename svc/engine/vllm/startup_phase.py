"""Reads the current phase of a vLLM start from its log."""

import re
from pathlib import Path

from svc.engine.state import EnginePhase

_SIGNS = {
    EnginePhase.ARGUMENTS: rb"non-default args",
    EnginePhase.CORE: rb"Initializing a V1 LLM engine",
    EnginePhase.WEIGHTS: rb"Loading model|Starting to load model",
    EnginePhase.CACHE: rb"Loading weights took",
    EnginePhase.WARM_UP: rb"KV cache size",
    EnginePhase.SOCKET: rb"Starting vLLM server",
}
_ORDER = list(EnginePhase)


class PhaseReader:
    """Follows one engine start. Each look reads only the log's new lines.

    Args:
        log: vLLM's output since this start; it may not exist yet.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._position = 0
        self._phase = EnginePhase.PYTHON

    def look(self) -> EnginePhase:
        """Return the phase that the log has reached, which is never earlier than the previous result."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._position)
                # The text after the last newline is not a complete line yet.
                new = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return self._phase
        self._position += len(new)
        reached = [phase for phase, sign in _SIGNS.items() if re.search(sign, new)]
        self._phase = max([self._phase, *reached], key=_ORDER.index)
        return self._phase
