"""A uvicorn server for a single listener, with limits on its connections."""

import asyncio
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from serving.http.connections import REQUEST_DEADLINE_S, ClientProtocol, watched
from serving.server.acceptor import Acceptor
from serving.server.address_limit import AddressLimit
from serving.server.tls import Certificate
from serving.server.warning_limit import WarningLimit

_GRACE_S = 30  # for running requests after SIGTERM
_HANDSHAKE_GRACE_S = 1.0  # for TLS handshakes after SIGTERM
_DATE_S = 1.0  # resolution of the Date header
_WARNING_LIMIT = WarningLimit()


class HttpServer(uvicorn.Server):
    """uvicorn's server without its own signal handlers.

    The handlers in serving.server.server are used instead, because they can also interrupt a server's startup.

    Args:
        most: maximum number of open connections.
        most_per_address: maximum number of connections from one address that is not a proxy, or None for no
            limit.
        certificate: the TLS certificate, or None for plain HTTP.
        proxies: addresses whose forwarding headers are trusted; any other client can forge these headers.
        deadline_s: see `REQUEST_DEADLINE_S` in serving.http.connections.
        idle_s: maximum idle time of a connection between two requests, in seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        most: int,
        *,
        most_per_address: int | None = None,
        certificate: Certificate | None = None,
        proxies: Sequence[str] = (),
        deadline_s: float = REQUEST_DEADLINE_S,
        idle_s: int = 5,
    ) -> None:
        config = uvicorn.Config(
            watched(app),
            http=ClientProtocol,
            ws="none",  # a WebSocket handshake would bypass all our layers, and its path with the query would be logged
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(proxies),
            forwarded_allow_ips=list(proxies),
            timeout_keep_alive=idle_s,
            timeout_graceful_shutdown=_GRACE_S,
        )
        logging.getLogger("uvicorn.error").addFilter(_WARNING_LIMIT)
        config.load()
        super().__init__(config)
        self._most = most
        self._address_limit = AddressLimit(most_per_address or most, proxies)
        self._certificate = certificate
        self._deadline_s = deadline_s
        self._acceptors: list[Acceptor] = []
        self._stopping = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Override uvicorn's method so that it installs no signal handlers."""
        yield

    def stop(self) -> None:
        """Make `serve` return once the running requests have completed."""
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        """Keep the Date header current until the server stops.

        Unlike uvicorn's loop, this does not check ten times per second whether the server must stop.
        """
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                async with asyncio.timeout(_DATE_S):
                    await self._stopping.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, but with a limit on connections."""
        await super().startup(sockets=[])
        for listener in sockets or ():
            acceptor = Acceptor(
                listener,
                lambda: ClientProtocol(self.config, self.server_state, {}, deadline_s=self._deadline_s),
                most=self._most,
                address_limit=self._address_limit,
                context=self._certificate.context if self._certificate else None,
                handshake_s=REQUEST_DEADLINE_S,
            )
            acceptor.start()
            self._acceptors.append(acceptor)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down as uvicorn does, but without losing accepted connections."""
        await asyncio.gather(*(acceptor.stop(_HANDSHAKE_GRACE_S) for acceptor in self._acceptors))
        await super().shutdown(sockets=sockets)
