"""The outermost layer of the HTTP application. It admits requests, adds headers to responses and handles exceptions.

The headers contain the request id, the version, the processing time and the key's remaining limits.
The server generates request ids itself, because feedback refers to answers by id and a client may use an
id twice. The client's own id is stored and returned too. A version's name is sent only to clients that
may use the version. The layer is pure ASGI, because the framework's middleware would delay streams.

OpenAI has a single header for tokens, which shows the token limit with the smallest remaining share. Anthropic also has
separate headers for input and output tokens, and gives the time at which a limit is fully reset, while OpenAI gives the
duration until then.
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.admission.rate_limiter import Allowance, Limit, RateLimiter
from serving.gateway.authentication import Authentication
from serving.gateway.host import AllowedHosts
from serving.http.connections import connection_of
from serving.http.errors import api_error
from serving.http.request_state import STATE_KEY, RequestState
from serving.models.router import Router
from serving.protocols.route import ANTHROPIC_PATHS
from svc.identity.key_secret import hide_secrets

_CLIENT_HEADERS = (b"x-client-request-id", b"x-request-id")
_ID_BYTES, _BATCH = 16, 256
_CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")  # safe in a log line
_REQUESTS = Limit.REQUESTS_PER_MINUTE
_TOKENS = (Limit.TOKENS_IN_PER_MINUTE, Limit.TOKENS_OUT_PER_MINUTE, Limit.TOKENS_PER_DAY)


def rate_limit_headers(
    allowances: Mapping[Limit, Allowance], path: str, now: datetime | None = None
) -> list[tuple[bytes, bytes]]:
    """Return the rate limit headers for a response to `path`, covering all limits of the key."""
    requests, tokens = allowances.get(_REQUESTS), _tightest(allowances)
    headers: list[tuple[bytes, bytes]] = []
    for name, allowance in ((b"requests", requests), (b"tokens", tokens)):
        if allowance:
            headers += [
                (b"x-ratelimit-limit-" + name, b"%d" % allowance.limit),
                (b"x-ratelimit-remaining-" + name, b"%d" % allowance.remaining),
                (b"x-ratelimit-reset-" + name, duration(allowance.reset_s).encode()),
            ]
    if path not in ANTHROPIC_PATHS:
        return headers
    now = now or datetime.now(UTC)
    shown = {
        b"requests": requests,
        b"tokens": tokens,
        b"input-tokens": allowances.get(Limit.TOKENS_IN_PER_MINUTE),
        b"output-tokens": allowances.get(Limit.TOKENS_OUT_PER_MINUTE),
    }
    for name, allowance in shown.items():
        if allowance:
            full_at = now + timedelta(seconds=math.ceil(allowance.reset_s))
            prefix = b"anthropic-ratelimit-" + name
            headers += [
                (prefix + b"-limit", b"%d" % allowance.limit),
                (prefix + b"-remaining", b"%d" % allowance.remaining),
                (prefix + b"-reset", full_at.strftime("%Y-%m-%dT%H:%M:%SZ").encode()),
            ]
    return headers


def duration(seconds: float) -> str:
    """Return a duration, rounded up, in OpenAI's format: `120ms`, `1s`, `6m0s`, `1h0m0s`."""
    if seconds < 1:
        milliseconds = math.ceil(seconds * 1000)
        return f"{milliseconds}ms" if 0 < milliseconds < 1000 else f"{milliseconds // 1000}s"
    minutes, rest_s = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{rest_s}s"
    return f"{minutes}m{rest_s}s" if minutes else f"{rest_s}s"


def _tightest(allowances: Mapping[Limit, Allowance]) -> Allowance | None:
    limits = [allowances[limit] for limit in _TOKENS if limit in allowances]
    return min(limits, key=lambda allowance: allowance.remaining / (allowance.limit or 1), default=None)


def _random_numbers() -> Iterator[str]:
    """Yield 128-bit random numbers in hexadecimal.

    They are drawn in batches, because the system call takes longer than the rest of creating an id.
    """
    while True:
        batch = os.urandom(_ID_BYTES * _BATCH)
        for start in range(0, len(batch), _ID_BYTES):
            yield batch[start : start + _ID_BYTES].hex()


@dataclass(eq=False)
class RequestMiddleware:
    """The outermost ASGI layer, through which every request and response passes.

    Attributes:
        app: the wrapped application.
        authentication: admits requests before they are passed to the application.
        router: provides the production version if only one model is served. Responses that no version generated
            are labeled with this version.
        hosts: the accepted host names.
        limiter: provides a key's remaining limits.
        clock: function that returns monotonic time, in seconds.
    """

    app: ASGIApp
    router: Router
    hosts: AllowedHosts
    limiter: RateLimiter
    authentication: Authentication
    clock: Callable[[], float] = time.perf_counter
    _random: Iterator[str] = field(default_factory=_random_numbers, init=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, client = self.clock(), scope.get("client")
        headers = dict(reversed(scope["headers"]))
        state = RequestState(
            request_id=f"req-{next(self._random)}",
            headers=headers,
            address=client[0] if client else "",
            connection=connection_of(scope),
            client_request_id=_client_request_id(headers),
        )
        scope.setdefault("state", {})[STATE_KEY] = state
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                own = self._headers(state, scope["path"], self.clock() - started)
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        try:
            if not state.connection.through_socket:  # a web page cannot open a unix socket
                self.hosts.check(headers.get(b"host", b""))
            self.authentication.check(state, scope["path"])
            await self.app(scope, receive, send_with_headers)
        except Exception as error:
            if begun:
                raise  # uvicorn logs it and closes the connection, so the client sees that the answer is incomplete
            await api_error(error).response(scope["path"])(scope, receive, send_with_headers)

    def _headers(self, state: RequestState, path: str, seconds: float) -> list[tuple[bytes, bytes]]:
        """Return the headers common to all responses."""
        headers = [
            (b"x-request-id", state.request_id.encode("ascii")),
            (b"openai-processing-ms", b"%d" % (seconds * 1000)),
        ]
        if state.client_request_id:
            headers.append((b"x-client-request-id", state.client_request_id.encode("ascii")))
        if not state.admitted:  # the client is unknown, or need not identify itself
            return headers
        principal, version = state.principal, state.version or self.router.only_version
        if version and (principal is None or principal.may_ask(version.name)):
            headers.append((b"x-model-version", str(version).encode("ascii")))
        if principal:
            reservation = state.reservation
            allowances = reservation.allowances() if reservation else self.limiter.allowances(principal)
            headers += rate_limit_headers(allowances, path)
        return headers


def _client_request_id(headers: Mapping[bytes, bytes]) -> str | None:
    """Return the request id chosen by the client, or None if it is missing, invalid or contains a secret."""
    for name in _CLIENT_HEADERS:
        value = headers.get(name)
        if value is not None and _CLIENT_ID.fullmatch(value):
            text = value.decode("ascii")
            if hide_secrets(text) == text:
                return text
    return None
