"""Stops an engine when its actor has died, whatever the cause.

Ray kills an actor's process group, but an engine has a separate group, and its core survives a killed API server. The
guard is a shell that waits until a pipe is closed. Only the actor has the pipe's other end open.
"""

import subprocess
import sys
from pathlib import Path

from svc.engine.orphans import end_engine

_WAIT = 'read -r _ || exec "$@"'
"""A line in the pipe tells the guard to exit; the end of the pipe, when the actor dies, tells it to stop the engine."""


class Guard:
    """The guard of an engine, which is given by the folder with its lock and record."""

    def __init__(self, state: Path) -> None:
        command = ["sh", "-c", _WAIT, "sh", sys.executable, "-m", "svc.ray_engine.guard", str(state)]
        # In a separate session, so that Ray does not kill it together with the actor.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def dismiss(self) -> None:
        """Stop the guard, because the engine has been stopped."""
        self._process.communicate(b"\n")


if __name__ == "__main__":
    end_engine(Path(sys.argv[1]))
