"""Who sends a request, and whether they may: before anything else of it is looked at, its body least of all.

Keys are demanded as soon as there is one, and always for what changes the service. What comes through the socket in the
home needs none: only who owns the home can open it.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from serving.http.failed_keys import FailedKeys
from serving.http.request_state import RequestState, request_state
from serving.protocols.route import Route, TokenRoute
from svc.access.authenticator import Authenticator, Grant, InvalidKeyError, KeyFault
from svc.identity.principal import Scope

log = logging.getLogger(__name__)

_OPEN: Final = frozenset({"/health", "/health/live"})
"""What load balancers and orchestrators ask, which hold no secrets. It says of the inside only whether it is there."""
_SCOPES: Final = {
    **dict.fromkeys((route.value for route in (*Route, *TokenRoute)), Scope.INFER),
    "/v1/models": Scope.INFER,
    "/v1/feedback": Scope.FEEDBACK,
    "/metrics": Scope.METRICS,
    "/svc/status": Scope.METRICS,
}
_MODEL = "/v1/models/"
_ADMINISTRATION = "/svc/"
_BEARER = b"bearer "


class Authentication:
    """Lets requests in, and ends those whose key is right no more.

    Args:
        authenticator: has looked at the store.
        keys_needed: also where there is no key yet, because others than this machine can reach the server.
        on_failure: hears of each key that is not right.
    """

    def __init__(
        self, authenticator: Authenticator, *, keys_needed: bool = False, on_failure: Callable[[KeyFault], None]
    ) -> None:
        self._authenticator = authenticator
        self._keys_needed = keys_needed
        self._on_failure = on_failure
        self._failed = FailedKeys()

    async def run(self) -> None:
        """Follows the store, and ends what runs with a key that is right no more, until it is cancelled."""
        await self._authenticator.follow()

    def needs_key(self, state: RequestState, path: str) -> bool:
        """Return whether a request must come with a key."""
        if state.connection.through_socket:
            return False
        if self._keys_needed or not self._authenticator.empty:
            return True
        # The first key is made on the machine, by its owner: others are there, too.
        return _needed_scope(path) is Scope.ADMIN

    def admit(self, state: RequestState, path: str) -> Grant:
        """Return what a request's key grants.

        Raises:
            InvalidKeyError: there is no key, or it is not right.
            TooManyWrongKeysError: nor were many before it.
            KeysUnavailableError: nobody can say.
            PermissionDeniedError: the key is not for this.
        """
        try:
            grant = self._authenticator.grant(_secret(state.headers))
        except InvalidKeyError as error:
            self._on_failure(error.fault)
            if self._failed.add(state.address):
                sender = state.address or "here"
                log.warning("many wrong keys from %s, the last one %s; more are answered 429", sender, error.fault)
            raise
        needed = _needed_scope(path)
        if needed is not None:
            grant.principal.require(needed)
        return grant


class AuthenticationMiddleware:
    """Wraps the application; its errors are answered by what is around it."""

    def __init__(self, app: ASGIApp, authentication: Authentication) -> None:
        self._app = app
        self._authentication = authentication

    def __call__(self, scope: Connection, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http":
            state, path = request_state(scope), scope["path"]
            if not self._authentication.needs_key(state, path):
                state.admitted = True
            elif path not in _OPEN:
                state.grant = self._authentication.admit(state, path)
                state.admitted = True
        return self._app(scope, receive, send)


def _needed_scope(path: str) -> Scope | None:
    """None where any key will do: as for what does not exist."""
    found = _SCOPES.get(path)
    if found is not None:
        return found
    if path.startswith(_MODEL):
        return Scope.INFER
    return Scope.ADMIN if path.startswith(_ADMINISTRATION) else None


def _secret(headers: Mapping[bytes, bytes]) -> str | None:
    """From where OpenAI's clients put it, else Anthropic's."""
    bearer = headers.get(b"authorization", b"")
    if bearer[: len(_BEARER)].lower() == _BEARER:
        return bearer[len(_BEARER) :].strip().decode("latin-1")
    return headers.get(b"x-api-key", b"").strip().decode("latin-1")
