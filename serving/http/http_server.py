"""uvicorn with our limits, for one listener."""

import asyncio
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from serving.http.acceptor import AcceptedProtocol, Acceptor
from serving.http.address_limit import AddressLimit
from serving.http.connections import REQUEST_DEADLINE_S, limited_protocol
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
    """

    def __init__(self, config: uvicorn.Config, most: int, address_limit: AddressLimit) -> None:
        super().__init__(config)
        self._most = most
        self._address_limit = address_limit
        self._acceptors: list[Acceptor] = []
        self._ending = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield

    def stop(self) -> None:
        """Ends `serve`; running answers may end."""
        self.should_exit = True
        self._ending.set()

    async def main_loop(self) -> None:
        """Keeps the date of answers right until it is told to stop; uvicorn's looks ten times a second for that."""
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                async with asyncio.timeout(_DATE_S):
                    await self._ending.wait()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with a limit on connections."""
        await super().startup(sockets=[])
        config, state = self.config, self.server_state

        def protocol() -> AcceptedProtocol:
            make: Any = config.http_protocol_class
            made = make(config=config, server_state=state, app_state=self.lifespan.state)
            return cast(AcceptedProtocol, made)

        for listener in sockets or ():
            acceptor = Acceptor(
                listener,
                protocol,
                count=lambda: len(state.connections),
                most=self._most,
                address_limit=self._address_limit,
                context=config.ssl,
                handshake_s=REQUEST_DEADLINE_S,
            )
            acceptor.start()
            self._acceptors.append(acceptor)
            self.servers.append(cast(asyncio.Server, acceptor))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; no connection that was accepted is lost."""
        await asyncio.gather(*(acceptor.pause(_HANDSHAKE_GRACE_S) for acceptor in self._acceptors))
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
    """What answers on one listener.

    Args:
        most: connections at once.
        most_per_address: of one address that is not a proxy's; None for no limit.
        certificate: None for plain HTTP.
        proxies: what they say of their clients is believed; anybody else can write that too.
        deadline_s: see serving.http.connections.
        idle_s: so long a connection may be idle between two requests.
    """
    config = uvicorn.Config(
        app,
        http=limited_protocol(deadline_s),
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
    config.ssl = certificate.context if certificate else None
    return HttpServer(config, most, AddressLimit(most_per_address or most, proxies))
