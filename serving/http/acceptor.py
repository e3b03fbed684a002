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
from serving.http.warning_limit import WarningLimit
from svc.end_signal import EndSignal

log = logging.getLogger(__name__)
log.addFilter(WarningLimit())

_BACKLOG = 2048
_PAUSE_S = 1.0


class AcceptedProtocol(asyncio.BaseProtocol):
    """Protocol of a connection that was accepted.

    Attributes:
        lost: ends with the connection.
    """

    lost: EndSignal


class Acceptor:
    """Gives the connections that come to a listener to protocols; further ones than there may be are closed.

    Args:
        make_protocol: a new protocol.
        count: connections that have a protocol.
        most: at once, with those in their handshake.
        address_limit: for the connections of one address, with those in their handshake.
        context: of TLS; None for plain connections.
        handshake_s: longest time for a handshake, seconds.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], AcceptedProtocol],
        *,
        count: Callable[[], int],
        most: int,
        address_limit: AddressLimit,
        context: ssl.SSLContext | None,
        handshake_s: float,
    ) -> None:
        self._listener = listener
        self._make_protocol = make_protocol
        self._count = count
        self._most = most
        self._address_limit = address_limit
        self._context = context
        self._handshake_s = handshake_s if context else None
        self._beginning: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Accepts from now on."""
        self._listener.setblocking(False)
        self._listener.listen(_BACKLOG)
        self._accepting = asyncio.create_task(self._run())

    async def pause(self, patience_s: float) -> None:
        """Accepts no more; what has been accepted comes to its protocol.

        Args:
            patience_s: longest wait for handshakes.
        """
        if self._accepting is not None:
            self._accepting.cancel()
        if self._beginning:
            await asyncio.wait(self._beginning, timeout=patience_s)

    def close(self) -> None:
        """Accepts no more, and ends handshakes."""
        for task in (self._accepting, *self._beginning):
            if task is not None:
                task.cancel()

    async def wait_closed(self) -> None:
        """Returns when nothing runs any more."""
        tasks = {task for task in (self._accepting, *self._beginning) if task is not None}
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self) -> None:
        while True:
            # Waits first and accepts then: who ends `loop.sock_accept` may lose a connection that it has accepted.
            await self._connection_waits()
            try:
                accepted, peer = self._listener.accept()
            except (ConnectionAbortedError, BlockingIOError):  # its client has gone, or another process took it
                continue
            except OSError:  # no descriptors, no memory
                log.exception("no connection can be accepted; trying again in %g s", _PAUSE_S)
                await asyncio.sleep(_PAUSE_S)
                continue
            address = peer[0] if isinstance(peer, tuple) else None  # None through a unix socket
            if not self._enter(address):
                accepted.close()
                await asyncio.sleep(0)
                continue
            accepted.setblocking(False)
            task = asyncio.create_task(self._begin(accepted, address))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    async def _connection_waits(self) -> None:
        loop = asyncio.get_running_loop()
        waits = loop.create_future()
        loop.add_reader(self._listener, lambda: None if waits.done() else waits.set_result(None))
        try:
            await waits
        finally:
            loop.remove_reader(self._listener)

    def _enter(self, address: str | None) -> bool:
        """Count a connection until `_leave`; return False, and count nothing, if it is one too many."""
        if self._count() + len(self._beginning) >= self._most:
            return False
        if address is None or self._address_limit.enter(address):
            return True
        log.warning(
            "%s holds %d connections, further ones are closed: serve.max_connections_per_address",
            address,
            self._address_limit.most,
        )
        return False

    def _leave(self, address: str | None) -> None:
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
            protocol.lost.listen(lambda: self._leave(address))
