"""Authenticates and authorizes each request before anything else in the request is read, in particular its body.

A key is required as soon as any key exists, and always for administration. Requests through the socket in
tuneserve's home folder need no key, because only the directory's owner can open the socket.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Final

from serving.access.authenticator import Authenticator, Grant, InvalidKeyError, KeyFault
from serving.gateway.failed_keys import FailedKeys
from serving.http.request_state import RequestState
from serving.protocols.route import Route, TokenRoute
from svc.identity.principal import Principal, Scope

log = logging.getLogger(__name__)

_OPEN: Final = frozenset({"/health", "/health/live"})
"""Paths for load balancers and orchestrators, which have no keys. Their responses reveal only whether the
service is up."""
_SCOPES: Final = {
    **dict.fromkeys((route.value for route in (*Route, *TokenRoute)), Scope.INFER),
    "/v1/models": Scope.INFER,
    "/v1/feedback": Scope.FEEDBACK,
    "/v1/files": Scope.FILES,
    "/v1/uploads": Scope.FILES,
    "/v1/batches": Scope.FILES,
    "/metrics": Scope.METRICS,
    "/svc/status": Scope.METRICS,
}
_SCOPES_BELOW: Final = {
    "/v1/models/": Scope.INFER,
    "/v1/files/": Scope.FILES,
    "/v1/uploads/": Scope.FILES,
    "/v1/batches/": Scope.FILES,
    "/v1/fine_tuning/": Scope.JOBS,
    "/svc/": Scope.ADMIN,
}
_BEARER = b"bearer "


class Authentication:
    """Decides whether requests are admitted, based on their keys.

    Args:
        authenticator: the authenticator, which must have loaded the keys from the store.
        keys_needed: whether requests without a key are rejected even before the first key is created, because other
            machines can reach the server.
        on_failure: called for each missing or invalid key, with the fault that was found.
    """

    def __init__(
        self, authenticator: Authenticator, *, keys_needed: bool = False, on_failure: Callable[[KeyFault], None]
    ) -> None:
        self._authenticator = authenticator
        self._keys_needed = keys_needed
        self._on_failure = on_failure
        self._failed = FailedKeys()

    def valid_principal(self, key_id: str) -> Principal:
        """Return a key's principal, given the key's id instead of its secret. See `Authenticator.valid_principal`."""
        return self._authenticator.valid_principal(key_id)

    def check(self, state: RequestState, path: str) -> None:
        """Authorize a request. A public path needs no key. Raises the same errors as `admit`."""
        if self.needs_key(state, path):
            if path in _OPEN:
                return
            state.grant = self.admit(state, path)
        state.admitted = True

    def needs_key(self, state: RequestState, path: str) -> bool:
        """Return whether a request needs a key."""
        if state.connection.through_socket:
            return False
        if self._keys_needed or not self._authenticator.empty:
            return True
        # The owner creates the first key on the machine: other users may have accounts there.
        return _needed_scope(path) is Scope.ADMIN

    def admit(self, state: RequestState, path: str) -> Grant:
        """Return the grant of a request's key. Missing and invalid keys are counted and reported.

        Raises:
            InvalidKeyError: the key is missing or invalid.
            TooManyWrongKeysError: the key is invalid, as were too many earlier keys from the same address.
            KeysUnavailableError: the store that holds the keys cannot be read.
            PermissionDeniedError: the key lacks the required scope.
        """
        try:
            grant = self._authenticator.grant(_secret(state.headers))
        except InvalidKeyError as error:
            self._on_failure(error.fault)
            if self._failed.add(state.address):
                sender = state.address or "a local client"
                log.warning(
                    "too many invalid API keys from %s (latest error: %s); rejecting further invalid keys with status "
                    "429",
                    sender,
                    error.fault,
                )
            raise
        needed = _needed_scope(path)
        if needed is not None:
            grant.principal.require(needed)
        return grant


def _needed_scope(path: str) -> Scope | None:
    """Return the scope that a path requires, or None if any key is sufficient, as for paths that do not exist."""
    scope = _SCOPES.get(path)
    if scope is not None:
        return scope
    return next((scope for prefix, scope in _SCOPES_BELOW.items() if path.startswith(prefix)), None)


def _secret(headers: Mapping[bytes, bytes]) -> str | None:
    """Return the key's secret from the header used by OpenAI clients or, failing that, by Anthropic clients."""
    bearer = headers.get(b"authorization", b"")
    if bearer[: len(_BEARER)].lower() == _BEARER:
        return bearer[len(_BEARER) :].strip().decode("latin-1")
    return headers.get(b"x-api-key", b"").strip().decode("latin-1")
