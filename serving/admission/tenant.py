"""The tenants that share a model. Each key is a tenant, and all requests without a key together form another tenant."""

from typing import NamedTuple

from serving.one_shot_event import OneShotEvent
from svc.identity.principal import Principal


class Tenant(NamedTuple):
    """A tenant and its relative share of the slots.

    This is a tuple because one is created for each request, and tuples are cheap to create.

    Attributes:
        name: the key's id, or an empty string for the tenant of all requests without a key. Only the operator can
            create keys.
        weight: the tenant's share relative to other tenants when slots are scarce.
        interruption: event that admission triggers to interrupt a batch request. None for clients' requests, which are
            never interrupted.
    """

    name: str = ""
    weight: int = 1
    interruption: OneShotEvent | None = None

    @property
    def has_key(self) -> bool:
        """Whether the tenant is identified by an API key."""
        return bool(self.name)


NO_KEY = Tenant()


def tenant_of(principal: Principal | None, interruption: OneShotEvent | None = None) -> Tenant:
    """Return the tenant that a request belongs to.

    Args:
        principal: the principal of the key that the client sent, or None if it sent no key.
        interruption: only for batch requests; see `Tenant`.
    """
    if interruption is None:
        return Tenant(principal.key_id, principal.weight) if principal else NO_KEY
    return Tenant(principal.key_id if principal else "", principal.weight if principal else 1, interruption)
