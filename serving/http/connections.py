"""Limits the number of client connections, and closes those whose client sends no request or stops reading.

uvicorn waits indefinitely for a first request and for headers of any size, and closes a connection only
after its client has read everything. If clients used up all file descriptors, the server could not reach
its engines. The limits rely on asyncio's callbacks and on notifications from the application. Only
uvicorn's parser is replaced.
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
from serving.one_shot_event import OneShotEvent

REQUEST_DEADLINE_S = 15.0
"""Maximum time in seconds from the start of a connection, or its last response, until the headers of the next
request are complete."""
FULL_DEADLINES = 4
"""A client that reads none of its response is disconnected after `REQUEST_DEADLINE_S` multiplied by this number. For
completions, a shorter timeout applies, with the outcome `client_slow` (serving.gateway.delivery)."""
LAST_REQUEST_S = 1.0
"""When the server stops, it still answers requests that arrive on open connections within this many seconds."""
_STATE_KEY = "connection"
_OWN_DESCRIPTORS = 512
"""Number of file descriptors reserved for the store, logs, the registry and the server's own requests to
its engines."""
_MAX_CONNECTIONS = 8192
"""Maximum number of connections, even if the machine allows more. Each connection takes about ten kilobytes."""


def raise_descriptor_limit() -> int:
    """Raise this process's limit on open files as far as the system allows.

    Returns:
        The maximum number of client connections. Each may need a second descriptor for a connection to an
        engine.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    room = _MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else (hard - _OWN_DESCRIPTORS) // 2
    return max(1, min(_MAX_CONNECTIONS, room))


def _nothing() -> None:
    """Do nothing. This is the default for a connection's callbacks."""


@dataclass(slots=True)
class Connection:
    """A client connection, as seen by the requests that arrive on it.

    With its default values, which are meant for tests, a connection is never lost or slow.

    Attributes:
        through_socket: whether the client used the unix socket, which only the socket's owner can open.
        is_writable: whether data can be written without waiting. A lost connection accepts and discards all
            data.
        lost: event that is set when the connection is lost.
        abort: function that closes the connection immediately, discarding unsent data.
        on_request, on_answered: functions called when a request begins, and when its response is complete.
    """

    through_socket: bool = False
    is_writable: bool = True
    lost: OneShotEvent = field(default_factory=OneShotEvent)
    abort: Callable[[], None] = _nothing
    on_request: Callable[[], None] = _nothing
    on_answered: Callable[[], None] = _nothing


def connection_of(scope: Scope) -> Connection:
    return scope.get("state", {}).get(_STATE_KEY) or Connection()


def watched(app: ASGIApp) -> ASGIApp:
    """Wrap an application so that each connection is notified when a request begins and when it is answered."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        connection = connection_of(scope)
        connection.on_request()
        try:
            await app(scope, receive, send)
        finally:
            connection.on_answered()

    return answer


class ClientProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with additional limits, for an application wrapped by `watched`.

    Args:
        deadline_s: time limit for the next request, see REQUEST_DEADLINE_S.

    Attributes:
        connection: the connection object passed to each request.
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
        self._full_since: float | None = None  # None while the connection is writable
        self._timer: asyncio.TimerHandle | None = None
        self._ending = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start waiting for the first request."""
        self._client = cast(asyncio.Transport, transport)  # uvloop's transports are not a subclass of it
        connected = transport.get_extra_info("socket")
        self.connection.through_socket = connected is not None and connected.family == socket.AF_UNIX
        self.connection.abort = self._client.abort
        super().connection_made(self._client)
        self._await_request()
        self._check()

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify the running request that its connection has been lost."""
        if self._timer is not None:
            self._timer.cancel()
        self.parser.close()
        super().connection_lost(exc)
        self.connection.is_writable = True
        self.connection.lost.end()
        # Objects that refer to each other would only be freed by the garbage collector, which seldom runs.
        self.connection.abort = self.connection.on_request = self.connection.on_answered = _nothing

    def pause_writing(self) -> None:
        """Record that the client is reading too slowly for more data to be written."""
        self.connection.is_writable = False
        self._full_since = asyncio.get_running_loop().time()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Record that the client has read enough for writing to resume."""
        self.connection.is_writable = True
        self._full_since = None
        super().resume_writing()

    def shutdown(self) -> None:
        """Close the connection after the current request. If there is none, accept one more within LAST_REQUEST_S."""
        self._ending = True
        if self._waiting_since is None:
            super().shutdown()
        else:
            asyncio.get_running_loop().call_later(LAST_REQUEST_S, super().shutdown)

    def _begin_request(self) -> None:
        self._waiting_since = None
        if self._ending:
            super().shutdown()  # this answer is the last one, and its headers say so

    def _end_request(self) -> None:
        self.parser.unanswered -= 1
        self._await_request()

    def _await_request(self) -> None:
        self._waiting_since = asyncio.get_running_loop().time()

    def _check(self) -> None:
        """Close the connection if its client has sent no request, or has stopped reading, for too long. If not,
        schedule another check.

        A single timer serves all requests of a connection.
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
        self._client.close()  # stays open until its client has read the rest
        self._timer = loop.call_later(self._deadline_s, self._client.abort)
