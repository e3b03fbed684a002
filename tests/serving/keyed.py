"""Provides keys outside a store: a principal for each secret, so that limits are tested without a store."""

from collections.abc import Callable, Mapping

from serving.access.authenticator import Authenticator, Grant, KeyFault
from serving.gateway.authentication import Authentication
from serving.http.request_state import RequestState
from svc.identity.principal import Limits, Principal
from svc.identity.principal import Scope as Permission


class KnownCallers(Authentication):
    """Authenticates callers by the secret they send, in addition to the keys in the store.

    Args:
        principals: principals, keyed by secret.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        principals: Mapping[str, Principal],
        *,
        on_failure: Callable[[KeyFault], None],
    ) -> None:
        super().__init__(authenticator, on_failure=on_failure)
        self._principals = principals

    def needs_key(self, state: RequestState, path: str) -> bool:
        """Return whether a key was sent or is required."""
        return self._caller(state) is not None or super().needs_key(state, path)

    def admit(self, state: RequestState, path: str) -> Grant:
        """Return the caller's grant."""
        caller = self._caller(state)
        return Grant(caller) if caller else super().admit(state, path)

    def _caller(self, state: RequestState) -> Principal | None:
        headers = state.headers
        secret = headers.get(b"authorization", b"").removeprefix(b"Bearer ") or headers.get(b"x-api-key", b"")
        return self._principals.get(secret.decode())


def principal(key_id: str = "k1", *, weight: int = 1, **limits: int) -> Principal:
    """Return the principal for a key that may use every model.

    Args:
        limits: fields of `Limits`.
    """
    return Principal(key_id, key_id, frozenset({Permission.INFER}), None, Limits(**limits), weight)
