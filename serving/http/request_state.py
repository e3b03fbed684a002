"""The state of one request, stored in its ASGI scope and shared by all layers.

The outermost layer (serving.gateway.middleware) creates it, and authentication marks the request as admitted. The
endpoint then adds the values that the outermost layer sends in the response headers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from starlette.types import Scope

from serving.access.authenticator import Grant
from serving.admission.rate_limiter import Reservation
from serving.http.connections import Connection
from serving.http.peer import peer_of
from serving.one_shot_event import OneShotEvent
from svc.identity.principal import Principal
from svc.identity.principal import Scope as KeyScope
from svc.version import VersionId

STATE_KEY: Final = "request"


@dataclass(slots=True)
class RequestState:
    """State of a single request.

    Attributes:
        request_id: the id that the server generated.
        headers: header values keyed by lower-case name. If a header occurs twice, its first value is kept.
        address: the client's address, or an empty string for a unix socket.
        client_request_id: the client's own id, if it sent a valid one.
        admitted: whether authentication has admitted the request.
        grant: the key's grant, or None if no key was needed.
        version: the version that answers the request.
        reservation: the share of its key's limits that the request has reserved.
        interruption: event that interrupts a request in a batch; see `serving.admission.tenant.Tenant`.
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
    interruption: OneShotEvent | None = None

    @property
    def principal(self) -> Principal | None:
        """The sender of an admitted request, or None if no key was needed, in which case the sender is unrestricted.

        Raises:
            RuntimeError: the request has not been admitted.
        """
        if not self.admitted:
            raise RuntimeError("the request has not passed authentication")
        return self.grant.principal if self.grant else None

    @property
    def in_batch(self) -> bool:
        """Whether this is a request in a batch, which no client waits for."""
        return self.interruption is not None

    @property
    def caller(self) -> str:
        """Identity to which an admitted request is attributed: its key or, without a key, its peer. Empty for a unix
        socket.
        """
        principal = self.principal
        return principal.key_id if principal else peer_of(self.address)

    @property
    def owner(self) -> str:
        """Owner of the objects that an admitted request creates: the id of the request's key, or empty if no key was
        needed.
        """
        return self.principal.key_id if self.principal else ""

    @property
    def visible_owner(self) -> str | None:
        """The only owner whose files, jobs and batches an admitted request may see, or None if it is unrestricted."""
        principal = self.principal
        return None if principal is None or principal.may(KeyScope.ADMIN) else principal.key_id


def request_state(scope: Scope) -> RequestState:
    """Return the state of the request that an ASGI scope belongs to.

    Raises:
        KeyError: the request has not passed through the outermost layer.
    """
    state: RequestState = scope["state"][STATE_KEY]
    return state
