"""Connections of clients: as many as there are file descriptors for, and none that sends no request or reads nothing.

uvicorn waits for a first request without end and for headers of any size, and closes a connection only once its client
has read what was sent. Where descriptors run out, the server could not reach its engines any more. Here are the limits,
built on what asyncio calls and on the application's own requests, and on one part of uvicorn: its parser is replaced.
"""

import asyncio
import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.http.request_parser import RequestParser
from svc.one_shot_event import OneShotEvent

REQUEST_DEADLINE_S = 15.0
"""From a connection, or its last answer, to the end of the next request's headers."""
FULL_DEADLINES = 4
"""A client that reads nothing of its answer for this many deadlines is disconnected. Answers to completions have their
own timeout, which is shorter and counted as `client_slow` (serving.http.delivery)."""
LAST_REQUEST_S = 1.0
"""When the server ends, a request that is on its way on an open connection has so long to arrive, and is answered."""
_STATE_KEY = "connection"
_OWN_DESCRIPTORS = 512
"""For the store, logs, the registry and what the server asks its engines itself."""
_MOST = 8192
"""Each takes some ten kilobytes, whatever the machine allows."""


def raise_descriptor_limit() -> int:
    """Let this process open as many files as it may.

    Returns:
        How many connections of clients there is room for: each may have one to an engine.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    room = _MOST if hard == resource.RLIM_INFINITY else (hard - _OWN_DESCRIPTORS) // 2
    return max(1, min(_MOST, room))


def _nothing() -> None:
    """The default of a connection's callbacks."""


@dataclass(slots=True)
class Connection:
    """A client's connection as its requests see it. Without a server, as in tests, it is never lost and never slow.

    Attributes:
        through_socket: it came through a unix socket, which only its owner can open.
        is_writable: it takes more without a wait. A connection that was lost takes and forgets everything.
        lost: ends with the connection.
        abort: ends it immediately, whatever was not read yet.
        on_request, on_answered: called when a request begins, and when its answer is complete.
    """

    through_socket: bool = False
    is_writable: bool = True
    lost: OneShotEvent = field(default_factory=OneShotEvent)
    abort: Callable[[], None] = _nothing
    on_request: Callable[[], None] = _nothing
    on_answered: Callable[[], None] = _nothing


def connection_of(scope: Scope) -> Connection:
    """Return the connection that a request came on."""
    return scope.get("state", {}).get(_STATE_KEY) or Connection()


def watched(app: ASGIApp) -> ASGIApp:
    """Return the application, telling each connection when its requests begin and are answered."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        connection = connection_of(scope)
        connection.on_request()
        try:
            await app(scope, receive, send)
        finally:
            connection.on_answered()

    return answer


class ClientProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits, for an application that is `watched`.

    Args:
        deadline_s: see REQUEST_DEADLINE_S.

    Attributes:
        connection: given to each request.
    """

    def __init__(
        self,
        config: Any,
        server_state: Any,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        deadline_s: float = REQUEST_DEADLINE_S,
    ) -> None:
        self.connection = Connection(on_request=self._begin_request, on_answered=self._end_request)
        super().__init__(config, server_state, {**app_state, _STATE_KEY: self.connection}, _loop)
        self.parser: RequestParser = RequestParser(self)
        self._deadline_s = deadline_s
        self._waiting_since: float | None = None  # None while a request is answered
        self._full_since: float | None = None  # None while the connection takes more
        self._timer: asyncio.TimerHandle | None = None
        self._ending = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first request."""
        self._client = cast(asyncio.Transport, transport)  # uvloop's are no subclass of it
        connected = transport.get_extra_info("socket")
        self.connection.through_socket = connected is not None and connected.family == socket.AF_UNIX
        self.connection.abort = self._client.abort
        super().connection_made(self._client)
        self._await_request()
        self._check()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request that runs."""
        if self._timer is not None:
            self._timer.cancel()
        self.parser.close()
        super().connection_lost(exc)
        self.connection.is_writable = True
        self.connection.lost.end()
        # Objects that refer to each other would wait for the garbage collector, which seldom runs.
        self.connection.abort = self.connection.on_request = self.connection.on_answered = _nothing

    def pause_writing(self) -> None:
        """Remember that the client reads slowly."""
        self.connection.is_writable = False
        self._full_since = asyncio.get_running_loop().time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Remember that the client has read enough."""
        self.connection.is_writable = True
        self._full_since = None
        super().resume_writing()

    def shutdown(self) -> None:
        """End after the request that runs, or after one that arrives within LAST_REQUEST_S."""
        self._ending = True
        if self._waiting_since is None:
            super().shutdown()
        else:
            asyncio.get_running_loop().call_later(LAST_REQUEST_S, super().shutdown)

    def _begin_request(self) -> None:
        self._waiting_since = None
        if self._ending:
            super().shutdown()  # this answer is the last one, and says so

    def _end_request(self) -> None:
        self.parser.unanswered -= 1
        self._await_request()

    def _await_request(self) -> None:
        self._waiting_since = asyncio.get_running_loop().time()

    def _check(self) -> None:
        """Close the connection when its client sends no request or reads nothing.

        One timer serves all requests of a connection.
        """
        loop, left_s = asyncio.get_running_loop(), self._deadline_s
        if self._full_since is not None and self._full_since + FULL_DEADLINES * self._deadline_s <= loop.time():
            self._client.abort()
            return
        if self._waiting_since is not None:
            left_s = self._waiting_since + self._deadline_s - loop.time()
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._check)
            return
        self._client.close()  # it stays open until its client has read the rest
        self._timer = loop.call_later(self._deadline_s, self._client.abort)
