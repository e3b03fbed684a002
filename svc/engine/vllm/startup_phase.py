"""Determines the current phase of a vLLM startup from its log."""

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
    """Follows the startup of an engine in its log. Each call of `look` reads only the new lines.

    Args:
        log: file with vLLM's output since it was started. It may not exist yet.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._position = 0
        self._phase = EnginePhase.PYTHON

    def look(self) -> EnginePhase:
        """Return the current phase according to the log. It never goes back to an earlier phase."""
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
