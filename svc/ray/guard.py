"""Stops an engine when its actor has died, whatever the cause.

Ray kills an actor's process group, but the engine runs in a separate group, and vLLM's engine core survives when its
API server is killed. The guard is a shell that waits until a pipe is closed. Only the actor has the pipe's other end
open.
"""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from svc.engine.orphans import end_engine

_WAIT = 'exec 3<&0; (read -r _ <&3 || exec "$@" 3<&-) &'
"""Shell command of the guard. The guard exits if it reads a line from the pipe, and stops the engine if the pipe is
closed because the actor has died.

The guard is the child of a shell that exits immediately. It must not be a child of the actor, because an actor whose
node is lost kills its own children before it exits. A guard that was started as such a child died together with vLLM's
API server, and vLLM's core kept running.
"""


class Guard:
    """Background shell that stops an engine if the process that created the guard dies.

    Args:
        state: folder with the engine's lock and record.
    """

    def __init__(self, state: Path) -> None:
        command = ["sh", "-c", _WAIT, "sh", sys.executable, "-m", "svc.ray.guard", str(state)]
        # In a separate session, so that Ray does not kill it together with the actor.
        self._shell = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._shell.wait()

    def dismiss(self) -> None:
        """Stop the guard process. Call this after the engine has been stopped."""
        assert self._shell.stdin is not None  # noqa: S101 - a pipe
        with suppress(BrokenPipeError), self._shell.stdin as pipe:  # broken if the guard was killed
            pipe.write(b"\n")


if __name__ == "__main__":
    end_engine(Path(sys.argv[1]))
