"""The state of one request, shared by all layers: an object in the request's ASGI scope.

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
        request_id: the id that the server generated.
        headers: values by lower-case name; of two headers with the same name, the first.
        address: the client's address; empty for a unix socket.
        client_request_id: the client's own id, if it sent a valid one.
        admitted: whether authentication has admitted the request.
        grant: the key's grant; None if no key was needed.
        version: the version that answers.
        reservation: the share of its key's limits that the request has reserved.
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
        """Sender of an admitted request; None if no key was needed: that sender has full access.

        Raises:
            RuntimeError: the request was not admitted.
        """
        if not self.admitted:
            raise RuntimeError("the request has not passed authentication")
        return self.grant.principal if self.grant else None

    @property
    def caller(self) -> str:
        """Key or, without a key, peer to which an admitted request is attributed; empty for a unix socket."""
        principal = self.principal
        return principal.key_id if principal else peer_of(self.address)


def request_state(scope: Scope) -> RequestState:
    """Return the state of a request.

    Raises:
        KeyError: the request has not passed the outermost layer.
    """
    state: RequestState = scope["state"][STATE_KEY]
    return state
