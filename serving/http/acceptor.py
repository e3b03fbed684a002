"""Accepts connections, up to a number at once.

An event loop's own server accepts whatever comes and counts nothing, and a connection that never gets through its TLS
handshake reaches no protocol that could.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable

from serving.http.address_limit import AddressLimit
from serving.http.connections import ClientProtocol
from serving.http.warning_limit import WarningLimit

log = logging.getLogger(__name__)
log.addFilter(WarningLimit())

_BACKLOG = 2048
_PAUSE_S = 1.0


class Acceptor:
    """Gives the connections that come to a listener to protocols; further ones than there may be are closed.

    Args:
        make_protocol: a new protocol.
        most: connections at once, with those in their handshake.
        address_limit: for the connections of one address, with those in their handshake.
        context: of TLS; None for plain connections.
        handshake_s: longest time for a handshake, seconds.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], ClientProtocol],
        *,
        most: int,
        address_limit: AddressLimit,
        context: ssl.SSLContext | None,
        handshake_s: float,
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._most = most
        self._address_limit = address_limit
        self._context = context
        self._handshake_s = handshake_s if context else None
        self._open = 0
        self._handshakes: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Accept from now on."""
        self._listener.setblocking(False)
        self._listener.listen(_BACKLOG)
        self._resume()

    async def stop(self, patience_s: float) -> None:
        """Accept no more; connections that were accepted come to their protocols.

        Args:
            patience_s: longest wait for handshakes.
        """
        asyncio.get_running_loop().remove_reader(self._listener)
        if self._pause is not None:
            self._pause.cancel()
        if self._handshakes:
            _, late = await asyncio.wait(self._handshakes, timeout=patience_s)
            for task in late:
                task.cancel()

    def _resume(self) -> None:
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            accepted, peer = self._listener.accept()
        except (ConnectionAbortedError, BlockingIOError):  # its client has gone, or another process took it
            return
        except OSError:  # no descriptors, no memory
            log.exception("no connection can be accepted; trying again in %g s", _PAUSE_S)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
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
        """Count a connection until `_leave`; return False, and count nothing, if it is one too many."""
        if self._open >= self._most:
            return False
        if address is not None and not self._address_limit.enter(address):
            log.warning(
                "%s holds %d connections, further ones are closed: serve.max_connections_per_address",
                address,
                self._address_limit.most,
            )
            return False
        self._open += 1
        return True

    def _leave(self, address: str | None) -> None:
        self._open -= 1
        if address is not None:
            self._address_limit.leave(address)

    async def _begin(self, accepted: socket.socket, address: str | None) -> None:
        try:
            _, protocol = await asyncio.get_running_loop().connect_accepted_socket(
                self._make_protocol, accepted, ssl=self._context, ssl_handshake_timeout=self._handshake_s
            )
        except OSError as error:  # a handshake that failed, or came to no end; ssl.SSLError is one
            log.debug("a connection did not begin: %s", error)
            self._leave(address)
        except BaseException:
            self._leave(address)
            raise
        else:
            protocol.connection.lost.listen(lambda: self._leave(address))
