"""uvicorn with our limits, for one listener."""

import asyncio
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from serving.http.acceptor import Acceptor
from serving.http.address_limit import AddressLimit
from serving.http.connections import REQUEST_DEADLINE_S, ClientProtocol, watched
from serving.http.tls import Certificate
from serving.http.warning_limit import WarningLimit

_GRACE_S = 30  # running answers may end after SIGTERM
_HANDSHAKE_GRACE_S = 1.0  # so may handshakes
_DATE_S = 1.0  # the resolution of an answer's date
_WARNING_LIMIT = WarningLimit()


class HttpServer(uvicorn.Server):
    """Leaves signals to `serve`: they must also end a start that is under way.

    Args:
        most: connections at once.
        address_limit: for those of one address.
        certificate: None for plain HTTP.
        deadline_s: see serving.http.connections.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        most: int,
        address_limit: AddressLimit,
        certificate: Certificate | None,
        deadline_s: float,
    ) -> None:
        super().__init__(config)
        self._most = most
        self._address_limit = address_limit
        self._certificate = certificate
        self._deadline_s = deadline_s
        self._acceptors: list[Acceptor] = []
        self._stopping = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    def stop(self) -> None:
        """End `serve`; running answers may end."""
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        """Keep the date of answers right; uvicorn's own loop also looks ten times a second whether to stop."""
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _DATE_S)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with a limit on connections."""
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
        """As uvicorn's; no connection that was accepted is lost."""
        await asyncio.gather(*(acceptor.stop(_HANDSHAKE_GRACE_S) for acceptor in self._acceptors))
        await super().shutdown(sockets=sockets)


def http_server(
    app: ASGIApp,
    most: int,
    *,
    most_per_address: int | None = None,
    certificate: Certificate | None = None,
    proxies: Sequence[str] = (),
    deadline_s: float = REQUEST_DEADLINE_S,
    idle_s: int = 5,
) -> HttpServer:
    """Return a server for one listener.

    Args:
        most: connections at once.
        most_per_address: of one address that is not a proxy's; None for no limit.
        certificate: None for plain HTTP.
        proxies: what they say of their clients is believed; anybody else can write that too.
        deadline_s: see serving.http.connections.
        idle_s: so long a connection may be idle between two requests.
    """
    config = uvicorn.Config(
        watched(app),
        http=ClientProtocol,
        ws="none",  # its handshake would pass all our layers, and its path with the query would be logged
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
    return HttpServer(config, most, AddressLimit(most_per_address or most, proxies), certificate, deadline_s)
