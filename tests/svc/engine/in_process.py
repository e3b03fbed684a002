"""Connects the real client to an application without a socket."""

import httpx
from starlette.types import ASGIApp

from svc.engine.client import EngineClient


def client_of(app: ASGIApp, model: str = "tuned") -> EngineClient:
    """Return a client whose requests are handled by the application."""
    return EngineClient(httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine"), model)
