"""Who sends a request, and whether they may: before anything else of it is looked at, its body least of all.

Keys are demanded as soon as there is one, and always for what changes the service. What comes through the socket in the
home needs none: only who owns the home can open it. Puts `principal` into the state of the scope, None where no key was
needed, and `key_ended`: a signal that ends with an error when the key is right no more, so that what runs with it ends.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from serving.http.connections import THROUGH_SOCKET
from serving.http.failed_keys import FailedKeys
from serving.http.headers import headers_of
from serving.http.peer import peer_of
from serving.protocols.route import Route, TokenRoute
from svc.access.authenticator import Authenticator, Grant, InvalidKeyError, KeyFault
from svc.identity.principal import Principal, Scope

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


def principal_of(connection: Connection) -> Principal | None:
    """Who sent a request that was let in; None where no key was needed, who may do everything.

    Raises:
        KeyError: nobody has looked; nothing is answered then.
    """
    principal: Principal | None = connection["state"]["principal"]
    return principal


def caller_of(connection: Connection) -> str:
    """Return the key or, without one, the peer that a request counts for; empty through a unix socket.

    Raises:
        KeyError: see `principal_of`.
    """
    principal = principal_of(connection)
    if principal is not None:
        return principal.key_id
    peer = connection.get("client")
    return peer_of(peer[0]) if peer else ""


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

    def needs_key(self, connection: Connection) -> bool:
        """Whether a request must come with a key."""
        if connection["state"].get(THROUGH_SOCKET):
            return False
        if self._keys_needed or not self._authenticator.empty:
            return True
        # The first key is made on the machine, by its owner: others are there, too.
        return _needed_scope(connection["path"]) is Scope.ADMIN

    def admit(self, connection: Connection) -> Grant:
        """Who sends a request that must come with a key.

        Raises:
            InvalidKeyError: there is no key, or it is not right.
            TooManyWrongKeysError: nor were many before it.
            KeysUnavailableError: nobody can say.
            PermissionDeniedError: the key is not for this.
        """
        try:
            grant = self._authenticator.grant(_secret(connection))
        except InvalidKeyError as error:
            self._count(error.fault, connection)
            raise
        needed = _needed_scope(connection["path"])
        if needed is not None:
            grant.principal.require(needed)
        return grant

    def _count(self, fault: KeyFault, connection: Connection) -> None:
        self._on_failure(fault)
        peer = connection.get("client")
        address = peer[0] if peer else ""
        if self._failed.add(address):
            log.warning("many wrong keys from %s, the last one %s; more are answered 429", address or "here", fault)


class AuthenticationMiddleware:
    """Wraps the application; its errors are answered by what is around it."""

    def __init__(self, app: ASGIApp, authentication: Authentication) -> None:
        self._app = app
        self._authentication = authentication

    def __call__(self, scope: Connection, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http":
            state = scope["state"]
            if not self._authentication.needs_key(scope):
                state["principal"] = None
            elif scope["path"] not in _OPEN:
                grant = self._authentication.admit(scope)
                state["principal"], state["key_ended"] = grant.principal, grant.ended
        return self._app(scope, receive, send)


def _needed_scope(path: str) -> Scope | None:
    """None where any key will do: as for what does not exist."""
    found = _SCOPES.get(path)
    if found is not None:
        return found
    if path.startswith(_MODEL):
        return Scope.INFER
    return Scope.ADMIN if path.startswith(_ADMINISTRATION) else None


def _secret(connection: Connection) -> str | None:
    """From where OpenAI's clients put it, else Anthropic's."""
    headers = headers_of(connection)
    bearer = headers.get(b"authorization", b"")
    if bearer[: len(_BEARER)].lower() == _BEARER:
        return bearer[len(_BEARER) :].strip().decode("latin-1")
    return headers.get(b"x-api-key", b"").strip().decode("latin-1")
