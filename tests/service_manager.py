"""Stands in for systemd: listens for a service, starts it on that socket, and receives its notifications."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_ON_SOCKET = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServiceManager:
    """A service manager, which outlives the service's processes.

    Args:
        listener: socket to which the service's clients connect.
        notices: socket on which the service's processes report their state.
    """

    def __init__(self, listener: socket.socket, notices: socket.socket) -> None:
        self._listener = listener
        self._notices = notices
        self.told: list[str] = []

    @property
    def url(self) -> str:
        """Return the URL of the service."""
        host, port = self._listener.getsockname()
        return f"http://{host}:{port}"

    def start(
        self, command: Sequence[str], output: IO[bytes], environment: Mapping[str, str]
    ) -> "subprocess.Popen[bytes]":
        """Start a process of the service on the listening socket."""
        descriptor = self._listener.fileno()
        given = {"NOTIFY_SOCKET": self._notices.getsockname(), "WATCHDOG_USEC": "3000000"}
        return subprocess.Popen(
            [sys.executable, "-c", _ON_SOCKET, str(descriptor), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | dict(environment) | given,
            pass_fds=[descriptor],
        )

    def wait_for(self, notice: str, timeout_s: float = 60) -> None:
        """Wait until the given notification arrives, discarding those received earlier."""
        deadline = time.monotonic() + timeout_s
        self.told.clear()
        while notice not in self.told:
            self._notices.settimeout(max(0.01, deadline - time.monotonic()))
            self.told += self._notices.recv(4096).decode().splitlines()


@contextmanager
def service_manager(folder: Path) -> Iterator[ServiceManager]:
    """Run a service manager while the context is active.

    Args:
        folder: folder with a short path.
    """
    with socket.socket() as listener, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        listener.bind(("127.0.0.1", 0))
        listener.listen(2048)
        notices.bind(str(folder / "notify"))
        yield ServiceManager(listener, notices)
