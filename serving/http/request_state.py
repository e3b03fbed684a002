"""The state of one request that all layers share: one object in its ASGI scope.

The outermost layer (serving.http.middleware) creates it, authentication admits the request, and the endpoint adds the
values that the outermost layer sends in the response headers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from starlette.types import Scope

from serving.admission.rate_limiter import Reservation
from serving.http.connections import Connection
from serving.http.peer import peer_of
from svc.access.authenticator import Grant
from svc.identity.principal import Principal
from svc.version import VersionId

STATE_KEY: Final = "request"


@dataclass(slots=True)
class RequestState:
    """State of one request.

    Attributes:
        request_id: the server's own.
        headers: by lower-case name; the first of two with the same name.
        address: the client's; empty through a unix socket.
        client_request_id: the client's own id, if it sent a valid one.
        admitted: authentication has admitted the request.
        grant: grant of its key; None if no key was needed.
        version: the version that answers.
        reservation: the part of its key's limits that the request holds.
    """

    request_id: str
    headers: Mapping[bytes, bytes]
    address: str = ""
    connection: Connection = field(default_factory=Connection)
    client_request_id: str | None = None
    admitted: bool = False
    grant: Grant | None = None
    version: VersionId | None = None
    reservation: Reservation | None = None

    @property
    def principal(self) -> Principal | None:
        """Sender of an admitted request; None if no key was needed, for a sender who may do everything.

        Raises:
            RuntimeError: the request was not admitted.
        """
        if not self.admitted:
            raise RuntimeError("the request has not passed authentication")
        return self.grant.principal if self.grant else None

    @property
    def caller(self) -> str:
        """Key or, without one, the peer that an admitted request counts for; empty through a unix socket."""
        principal = self.principal
        return principal.key_id if principal else peer_of(self.address)


def request_state(scope: Scope) -> RequestState:
    """Return the state of a request.

    Raises:
        KeyError: the request has not passed the outermost layer.
    """
    state: RequestState = scope["state"][STATE_KEY]
    return state
