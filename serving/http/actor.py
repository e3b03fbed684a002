"""Identifies the author of a change that a request makes, for the audit log."""

from starlette.requests import Request

from serving.http.request_state import request_state
from svc.identity.actor import Actor


def actor_of(request: Request) -> Actor:
    """Return the author of a change that a request makes: its key or, without a key, the user who runs the server."""
    principal = request_state(request.scope).principal
    if principal is None:
        return Actor.local()
    return Actor.of(principal, request.client.host[:64] if request.client else "")
