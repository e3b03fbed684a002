"""The outermost layer: every answer carries its request's id, the version, how long it took and what is left of its
key's limits, and no exception gets past it.

A request's id is the server's own, since feedback finds an answer by it and a client may use an id twice. The client's
is kept beside it, and returned. A version is told to whom it may be. Pure ASGI, because the framework's middleware
would sit between a stream and its client. Puts `request_id` and `client_request_id` into the state of the scope; what
answers a completion puts `version` there, and `reservation`, by which it is told what is left of limits.
"""

import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.admission.rate_limiter import RateLimiter, Reservation
from serving.http.connections import THROUGH_SOCKET
from serving.http.direct_answer import direct_answer
from serving.http.errors import api_error
from serving.http.header_lines import HeaderLines, headers_in
from serving.http.headers import headers_of
from serving.http.host import AllowedHosts
from serving.http.rate_limit_headers import rate_limit_headers
from serving.router import Router
from svc.identity.key_secret import hide_secrets
from svc.identity.principal import Principal
from svc.version import VersionId

_CLIENT_HEADERS = (b"x-client-request-id", b"x-request-id")
_CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")  # fit for a log line


class RequestMiddleware:
    """Wraps the application.

    Args:
        app: what is wrapped.
        router: tells the version in production where there is one model, for answers that no version gave.
        hosts: the names that are answered to.
        limiter: knows what is left of a key's limits.
        clock: monotonic time, seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        router: Router,
        hosts: AllowedHosts,
        limiter: RateLimiter,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app = app
        self._router = router
        self._hosts = hosts
        self._limiter = limiter
        self._clock = clock
        self._random = _Randomness()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, state = self._clock(), scope.setdefault("state", {})
        state["request_id"] = request_id = f"req-{self._random.take()}"
        ids = b"x-request-id: %b\r\n" % request_id.encode("ascii")
        if given := _client_request_id(scope):
            state["client_request_id"] = given.decode("ascii")
            ids += b"x-client-request-id: %b\r\n" % given
        begun = False

        def headers() -> HeaderLines:
            return ids + self._headers(scope, started)

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message.get("headers", ()), *headers_in(headers())]}
            await send(message)

        direct = direct_answer(scope)
        if direct is not None:
            direct.common_headers = headers
        try:
            if not state.get(THROUGH_SOCKET):  # no page can open it
                self._hosts.check(scope)
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if begun or (direct is not None and direct.begun):
                raise  # the server in front logs it and cuts the connection: the client sees that it is not complete
            await api_error(error).response(scope["path"])(scope, receive, send_with_headers)

    def _headers(self, scope: Scope, started: float) -> HeaderLines:
        """What all answers have beside their ids."""
        state = scope["state"]
        lines = b"openai-processing-ms: %d\r\n" % ((self._clock() - started) * 1000)
        if version := self._shown_version(state):
            lines += b"x-model-version: %b\r\n" % str(version).encode("ascii")
        if principal := state.get("principal"):
            reservation: Reservation | None = state.get("reservation")
            left = reservation.allowances() if reservation else self._limiter.allowances(principal)
            lines += rate_limit_headers(left, scope["path"])
        return lines

    def _shown_version(self, state: Mapping[str, Any]) -> VersionId | None:
        version = state.get("version") or self._router.only_version
        if version is None or "principal" not in state:  # nobody knows who asks, or they need not say it
            return None
        principal: Principal | None = state["principal"]
        return version if principal is None or principal.may_ask(version.name) else None


class _Randomness:
    """Numbers that nobody can guess, many from one call to the kernel, which takes longer than all else of an id."""

    _BYTES, _MANY = 16, 256

    def __init__(self) -> None:
        self._pool = ""

    def take(self) -> str:
        """128 bits, in hexadecimal."""
        if not self._pool:
            self._pool = os.urandom(self._BYTES * self._MANY).hex()
        taken, self._pool = self._pool[: 2 * self._BYTES], self._pool[2 * self._BYTES :]
        return taken


def _client_request_id(scope: Scope) -> bytes | None:
    headers = headers_of(scope)
    for name in _CLIENT_HEADERS:
        value = headers.get(name)
        if value is not None and _CLIENT_ID.fullmatch(value) and not _has_secret(value):
            return value
    return None


def _has_secret(value: bytes) -> bool:
    """The id is kept and returned, and a secret is neither."""
    text = value.decode("ascii")
    return hide_secrets(text) != text
