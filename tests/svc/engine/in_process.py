"""The real client connected to an application without a socket."""

import httpx
from starlette.types import ASGIApp

from svc.engine.client import EngineClient


def client_of(app: ASGIApp, model: str = "tuned") -> EngineClient:
    """Return a client whose requests the application answers."""
    return EngineClient(httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine"), model)
