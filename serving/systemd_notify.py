"""What a service manager that speaks systemd's protocol gives to a process, and hears from it.

It gives a socket that it listens on itself, so that no connection is refused while the process is replaced, and it
hears when the process is ready, that it is alive, and that it ends. Two variables and one datagram: no library is
needed. Without a manager nothing of this happens.
"""

import asyncio
import logging
import os
import socket
from collections.abc import MutableMapping

from svc.errors import SettingsError

log = logging.getLogger(__name__)

_FIRST_DESCRIPTOR = 3
"""Where the manager puts what it passes on, after the standard streams."""
_BEAT_S = 5.0
_PATIENCE_S = 60.0
"""A start or an end may go on so long after the last sign of life."""


def inherited_listener(environment: MutableMapping[str, str] = os.environ) -> socket.socket | None:
    """The TCP socket that the manager listens on for this process; None where it gave none.

    Args:
        environment: is cleared of it, because no process that we start may take the socket for its own.

    Raises:
        SettingsError: what was given is not one TCP socket that listens.
    """
    owner, count = environment.pop("LISTEN_PID", None), environment.pop("LISTEN_FDS", None)
    environment.pop("LISTEN_FDNAMES", None)
    if count is None or owner != str(os.getpid()):  # of a process that started this one
        return None
    if count != "1":
        raise SettingsError(
            f"the service manager passed LISTEN_FDS={count}",
            expected="one socket",
            todo="name one ListenStream= in the .socket unit",
        )
    return _listener(_FIRST_DESCRIPTOR)


def _listener(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        raise SettingsError(
            f"the service manager passed no socket: {error.strerror}", todo="see Sockets= in the .service unit"
        ) from error
    tcp = listener.family in (socket.AF_INET, socket.AF_INET6) and listener.type == socket.SOCK_STREAM
    # Who comes through a unix socket needs no key here, and whoever may open the manager's is not known.
    if not tcp or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.detach()
        raise SettingsError(
            "the service manager passed a socket that is not TCP, or does not listen",
            expected="ListenStream=ADDRESS:PORT and Accept=no in the .socket unit",
        )
    return listener


class ServiceManager:
    """Who started this process and watches it.

    Args:
        address: of its socket; None where there is none, and nothing is told.
        watchdog_s: it takes the process for hung after so long without a sign of life; None: never.
    """

    def __init__(self, address: str | None, watchdog_s: float | None = None) -> None:
        self._address = address
        self._beat_s = min(_BEAT_S, watchdog_s / 3) if watchdog_s else _BEAT_S

    @classmethod
    def of(cls, environment: MutableMapping[str, str] = os.environ) -> "ServiceManager":
        """The one that the environment names.

        Args:
            environment: is cleared of it: a process that we start must not speak for us.
        """
        address = environment.pop("NOTIFY_SOCKET", None)
        interval, owner = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", None)
        watched = interval.isdecimal() and int(interval) > 0 and owner in (None, str(os.getpid()))
        return cls(address, int(interval) / 1e6 if watched else None)

    def ready(self, status: str) -> None:
        """The service can be used.

        Args:
            status: one line for people.
        """
        self._tell(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """The process ends by its own will."""
        self._tell("STOPPING=1")

    async def run(self) -> None:
        """Tells until it is cancelled that the event loop turns: a long start is no hung one."""
        while True:
            self._tell(f"WATCHDOG=1\nEXTEND_TIMEOUT_USEC={_PATIENCE_S * 1e6:.0f}")
            await asyncio.sleep(self._beat_s)

    def _tell(self, text: str) -> None:
        """A manager that does not hear is no reason to serve nobody."""
        if not self._address:
            return
        path = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto(text.encode(), path)
        except OSError:
            log.warning("the service manager at %s does not hear", self._address, exc_info=True)
