"""Connections of clients: as many as there are file descriptors for, and none that sends no request or reads nothing.

uvicorn accepts whatever comes, waits for a first request without end and for headers of any size, and closes a
connection only once its client has read what was sent. Where descriptors run out, the server could not reach its
engines any more.
"""

import asyncio
import resource
import socket
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.http.direct_answer import offer_direct_answer
from serving.http.request_parser import RequestParser
from svc.end_signal import EndSignal

REQUEST_DEADLINE_S = 15.0
"""From a connection, or its last answer, to the end of the next request's headers."""
LAST_REQUEST_S = 1.0
"""When the server ends, a request that is on its way on an open connection has so long to arrive, and is answered."""
MOST_HEAD_BYTES = 64 * 1024
"""Of one request's headers, and what one read may bring beyond."""
ABORT = "abort"
"""Key in the state of a scope: a function that ends its connection at once, whatever was not read yet."""
LOST = "lost"
"""Key in the state of a scope: an EndSignal that ends with its connection."""
THROUGH_SOCKET = "through_socket"
"""Key in the state of a scope: the connection came through a unix socket, which only its owner can open."""
_OWN_DESCRIPTORS = 512
"""For the store, logs, the registry and what the server asks its engines itself."""
_MOST = 8192
"""Each takes some ten kilobytes, whatever the machine allows."""


def raise_descriptor_limit() -> int:
    """Lets this process open as many files as it may.

    Returns:
        How many connections of clients there is room for: each may have one to an engine.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    room = _MOST if hard == resource.RLIM_INFINITY else (hard - _OWN_DESCRIPTORS) // 2
    return max(1, min(_MOST, room))


def limited_protocol(deadline_s: float = REQUEST_DEADLINE_S) -> type[asyncio.Protocol]:
    """uvicorn's protocol with limits.

    Args:
        deadline_s: see REQUEST_DEADLINE_S.
    """

    class LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _deadline: asyncio.TimerHandle | None = None
        _head_bytes = 0
        _ending = False
        app_state: dict[str, Any]

        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            self.lost = EndSignal()
            if isinstance(self, HttpToolsProtocol):
                self.parser = RequestParser(self)

        def connection_made(self, transport: asyncio.Transport) -> None:
            connected = transport.get_extra_info("socket")
            through_socket = connected is not None and connected.family == socket.AF_UNIX
            self.app_state = {
                **self.app_state,
                ABORT: transport.abort,
                LOST: self.lost,
                THROUGH_SOCKET: through_socket,
            }
            super().connection_made(transport)
            self._await_request()

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            is_head = before is None or not before.more_body  # also of a request that waits behind one that is answered
            super().data_received(data)
            if self._ending and self._in_request:
                self.cycle.keep_alive = False
            self._head_bytes = self._head_bytes + len(data) if is_head and self.cycle is before else 0
            if self._head_bytes > MOST_HEAD_BYTES:
                self.transport.abort()
                return
            if self._deadline is None and not self._in_request:  # uvicorn closes what stays idle between requests
                self._await_request()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
            super().connection_lost(exc)
            self.lost.end()

        def shutdown(self) -> None:
            self._ending = True
            if self._in_request:
                super().shutdown()
                return
            asyncio.get_running_loop().call_later(LAST_REQUEST_S, self._end_idle)

        def _end_idle(self) -> None:
            if not self.transport.is_closing():
                super().shutdown()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._abort_later()

        def on_headers_complete(self) -> None:
            if not self.parser.ignores_head:
                super().on_headers_complete()

        def on_message_complete(self) -> None:
            if not self.parser.ignores_head:
                super().on_message_complete()

        def _unsupported_upgrade_warning(self) -> None:
            """Log nothing: uvicorn advises to install a library for websockets."""

        def _start_asgi_task(self, cycle: Any, app: Any) -> None:
            offer_direct_answer(cycle)
            super()._start_asgi_task(cycle, app)

        @property
        def _in_request(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _await_request(self) -> None:
            self._deadline = asyncio.get_running_loop().call_later(deadline_s, self._check, self.cycle)

        def _check(self, before: object) -> None:
            self._deadline = None
            if self.cycle is before and not self.transport.is_closing():
                self.transport.close()
                self._abort_later()

        def _abort_later(self) -> None:
            """A closed connection stays until its client has read the rest."""
            self._deadline = asyncio.get_running_loop().call_later(deadline_s, self.transport.abort)

    return LimitedProtocol
