"""Address at which an engine accepts requests: a Unix socket on this machine, or a TLS port on another machine."""

import asyncio
import socket as sockets
import ssl
from dataclasses import dataclass
from pathlib import Path

_CONNECT_PAUSE_S = 0.005


@dataclass(frozen=True, slots=True)
class TlsAddress:
    """A TCP port that speaks TLS.

    Attributes:
        context: TLS context that accepts only the engine's own certificate, and presents this server's certificate.
    """

    host: str
    port: int
    context: ssl.SSLContext


EngineAddress = Path | TlsAddress
"""A Unix socket, or a host and a port that require TLS."""


async def connect_to_socket(path: str) -> sockets.socket:
    """Connect a socket to a Unix socket, waiting while the listener's backlog is full.

    asyncio's `sock_connect` would treat a socket as connected even if the kernel rejected it because of a
    full backlog.

    Raises:
        OSError: no process is listening.
    """
    connecting = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        while True:
            try:
                connecting.connect(path)
            except BlockingIOError:
                await asyncio.sleep(_CONNECT_PAUSE_S)
            else:
                return connecting
    except BaseException:
        connecting.close()
        raise
