"""A service that uses API keys."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from serving.access.keyring import IssuedKey, Keyring
from serving.protocols.route import Route
from svc.identity.principal import Scope
from tests.builders.actors import ALICE
from tests.serving.service import CHAT, NAME, Service

BODIES: dict[Route, dict[str, Any]] = {
    Route.CHAT_COMPLETIONS: CHAT,
    Route.COMPLETIONS: {"model": NAME, "prompt": "one two three", "max_tokens": 1000},
    Route.MESSAGES: {**CHAT, "max_tokens": 1000},
    Route.RESPONSES: {"model": NAME, "input": "one two three"},
}
CLIENT = frozenset({Scope.INFER, Scope.FEEDBACK})


class KeyedService(Service):
    """A service that requires keys as soon as one exists."""

    def key(self, *scopes: Scope, **given: Any) -> IssuedKey:
        """Create a key that is already known to the service."""
        assert self.store is not None
        issued = Keyring(self.store, ALICE).create(frozenset(scopes) or CLIENT, **given)
        self.authenticator.refresh()
        return issued

    def revoke(self, issued: IssuedKey) -> None:
        """Revoke a key. The service notices at its next check."""
        assert self.store is not None
        Keyring(self.store, ALICE).revoke(issued.key.id)

    @asynccontextmanager
    async def client_of(self, issued: IssuedKey) -> AsyncIterator[httpx.AsyncClient]:
        """Yield a client of the application that uses a key and receives each response as a whole."""
        async with self.client() as client:
            client.headers["authorization"] = f"Bearer {issued.secret}"
            yield client
