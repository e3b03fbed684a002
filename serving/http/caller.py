"""Who sent a request, as whoever checked its key wrote it into the state of the scope."""

from starlette.types import Scope

from svc.principal import Principal

PRINCIPAL = "principal"
"""Key in the state of a scope: a `svc.principal.Principal`; None, or absent, where there is no key."""


def principal_of(scope: Scope) -> Principal | None:
    """Whose key a request came with; None for one that no limits of a key are for."""
    principal: Principal | None = scope["state"].get(PRINCIPAL)
    return principal
