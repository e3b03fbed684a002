"""Accepts client connections, up to a maximum number of open connections.

asyncio's own server accepts an unlimited number of connections, and a connection that never completes its TLS
handshake never reaches a protocol that could count it.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from serving.http.connections import ClientProtocol
from serving.server.address_limit import AddressLimit
from serving.server.warning_limit import WarningLimit

log = logging.getLogger(__name__)
log.addFilter(WarningLimit())

_BACKLOG = 2048
_PAUSE_S = 1.0


@dataclass(eq=False)
class Acceptor:
    """Accepts a listener's connections and passes them to protocols. Connections that exceed the limits are closed.

    Attributes:
        make_protocol: function that returns a new protocol.
        most: maximum number of connections, including those in their handshake.
        address_limit: limit per address, including connections in their handshake.
        context: TLS context, or None for unencrypted connections.
        handshake_s: time limit for a handshake, in seconds.
    """

    listener: socket.socket
    make_protocol: Callable[[], ClientProtocol]
    most: int
    address_limit: AddressLimit
    context: ssl.SSLContext | None
    handshake_s: float

    def __post_init__(self) -> None:
        self._open = 0
        self._handshakes: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self.listener.setblocking(False)
        self.listener.listen(_BACKLOG)
        self._resume()

    async def stop(self, patience_s: float) -> None:
        """Stop accepting connections. Connections that were already accepted are still passed to their protocols.

        Args:
            patience_s: longest wait for handshakes in progress, in seconds.
        """
        asyncio.get_running_loop().remove_reader(self.listener)
        if self._pause is not None:
            self._pause.cancel()
        if self._handshakes:
            _, late = await asyncio.wait(self._handshakes, timeout=patience_s)
            for task in late:
                task.cancel()

    def _resume(self) -> None:
        asyncio.get_running_loop().add_reader(self.listener, self._accept)

    def _accept(self) -> None:
        try:
            accepted, peer = self.listener.accept()
        except (ConnectionAbortedError, BlockingIOError):  # its client has closed it, or another process accepted it
            return
        except OSError:  # no descriptors, no memory
            log.exception("could not accept a connection; retrying in %g s", _PAUSE_S)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self.listener)
            self._pause = loop.call_later(_PAUSE_S, self._resume)
            return
        address = peer[0] if isinstance(peer, tuple) else None  # None through a unix socket
        if not self._enter(address):
            accepted.close()
            return
        accepted.setblocking(False)
        task = asyncio.create_task(self._begin(accepted, address))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    def _enter(self, address: str | None) -> bool:
        """Count a connection as open until `_leave` is called, or return False if a limit has been reached."""
        if self._open >= self.most:
            return False
        if address is not None and not self.address_limit.enter(address):
            log.warning(
                "%s has reached `serve.max_connections_per_address` (%d connections); closing its new connections",
                address,
                self.address_limit.most,
            )
            return False
        self._open += 1
        return True

    def _leave(self, address: str | None) -> None:
        self._open -= 1
        if address is not None:
            self.address_limit.leave(address)

    async def _begin(self, accepted: socket.socket, address: str | None) -> None:
        handshake_s = self.handshake_s if self.context else None
        try:
            _, protocol = await asyncio.get_running_loop().connect_accepted_socket(
                self.make_protocol, accepted, ssl=self.context, ssl_handshake_timeout=handshake_s
            )
        except OSError as error:  # the handshake failed or timed out; ssl.SSLError is a subclass
            log.debug("a connection failed before its first request: %s", error)
            self._leave(address)
        except BaseException:
            self._leave(address)
            raise
        else:
            protocol.connection.lost.listen(lambda: self._leave(address))
