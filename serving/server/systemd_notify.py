"""Implements the protocol between systemd and the processes that it starts.

The service manager listens on a socket and passes that socket to the process, so no connection is refused
while the process is replaced. The process reports that it is ready, alive, or stopping. No library is used,
because the protocol consists of a few environment variables and one kind of datagram. Without a service
manager, this module does nothing.
"""

import asyncio
import logging
import os
import socket
from collections.abc import MutableMapping

from svc.errors import SettingsError

log = logging.getLogger(__name__)

_FIRST_DESCRIPTOR = 3
"""First file descriptor that the service manager passes. Lower numbers are the standard streams."""
_BEAT_S = 5.0
_PATIENCE_S = 60.0
"""Additional time for startup or shutdown, in seconds, requested from the service manager with each report that the
event loop is running."""


def inherited_listener(environment: MutableMapping[str, str] = os.environ) -> socket.socket | None:
    """Return the TCP socket on which the service manager listens on behalf of this process, or None if there is none.

    Args:
        environment: the environment variables. The variables that describe the socket are removed, so that no child
            process uses it.

    Raises:
        SettingsError: the service manager passed something other than one listening TCP socket.
    """
    owner, count = environment.pop("LISTEN_PID", None), environment.pop("LISTEN_FDS", None)
    environment.pop("LISTEN_FDNAMES", None)
    if count is None or owner != str(os.getpid()):  # for the parent process
        return None
    if count != "1":
        raise SettingsError(
            f"the service manager passed LISTEN_FDS={count}",
            expected="exactly one socket",
            todo="set one ListenStream= in the .socket unit",
        )
    return _listener(_FIRST_DESCRIPTOR)


def _listener(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        raise SettingsError(
            f"the service manager did not pass a socket: {error.strerror}", todo="check Sockets= in the .service unit"
        ) from error
    tcp = listener.family in (socket.AF_INET, socket.AF_INET6) and listener.type == socket.SOCK_STREAM
    # Requests through a unix socket need no key here, and it is unknown who may open the manager's socket.
    if not tcp or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.detach()
        raise SettingsError(
            "the service manager passed a socket that is not a listening TCP socket",
            expected="ListenStream=ADDRESS:PORT and Accept=no in the .socket unit",
        )
    return listener


class ServiceManager:
    """The service manager that started this process and watches it.

    Args:
        address: address of the service manager's socket. If None, nothing is reported.
        watchdog_s: seconds without a report after which the service manager considers the process hung. None
            means never.
    """

    def __init__(self, address: str | None, watchdog_s: float | None = None) -> None:
        self._address = address
        self._beat_s = min(_BEAT_S, watchdog_s / 3) if watchdog_s else _BEAT_S

    @classmethod
    def of(cls, environment: MutableMapping[str, str] = os.environ) -> "ServiceManager":
        """Return the service manager named in the environment. If none is named, the returned object has no address.

        Args:
            environment: the environment variables. The variables that describe the service manager are removed, because
                child processes must not report on behalf of this process.
        """
        address = environment.pop("NOTIFY_SOCKET", None)
        interval, owner = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", None)
        watched = interval.isdecimal() and int(interval) > 0 and owner in (None, str(os.getpid()))
        return cls(address, int(interval) / 1e6 if watched else None)

    def ready(self, status: str) -> None:
        """Report that the service is ready, with a one-line human-readable status."""
        self._send(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """Report that the process is stopping intentionally, rather than because of a fault."""
        self._send("STOPPING=1")

    async def run(self) -> None:
        """Report at regular intervals, until cancelled, that the event loop is running.

        This way, a slow startup does not look like a hang.
        """
        while True:
            self._send(f"WATCHDOG=1\nEXTEND_TIMEOUT_USEC={_PATIENCE_S * 1e6:.0f}")
            await asyncio.sleep(self._beat_s)

    def _send(self, text: str) -> None:
        """Send a message to the service manager. A failure to send it is only logged."""
        if not self._address:
            return
        path = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto(text.encode(), path)
        except OSError:
            log.warning("could not reach the service manager at %s", self._address, exc_info=True)
