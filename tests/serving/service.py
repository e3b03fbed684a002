"""The gateway in front of a double of the engine, put together as the server does it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from serving.app import build_app
from serving.gateway import Gateway
from serving.hold import Admission
from serving.routing import Routes, Served
from serving.traffic import Traffic
from serving.upstream import connect
from svc.registry.version import Format, VersionId
from svc.settings import ServeSettings
from tests.serving.engine_double import EngineDouble, running_engine
from tests.serving.socket_server import SocketServer, running

NAME = "tuned"
ONE = Served(VersionId(NAME, 1), Format.MERGED)
TWO = Served(VersionId(NAME, 2), Format.GPTQ)
CHAT: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "one two three"}]}


class Service:
    """Everything between a client and the engine.

    Args:
        folder: for sockets.
        settings: fields of ServeSettings that differ from the default.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.settings = ServeSettings(**settings)
        self.double = EngineDouble(name=NAME)
        self.door = Admission(
            max_running=self.settings.max_running,
            max_held=self.settings.max_held,
            hold_timeout_s=self.settings.hold_timeout_s,
        )
        self.routes = Routes(NAME, clock=lambda: 1_700_000_000.0)
        self.registry = CollectorRegistry()
        self.traffic = Traffic(self.registry)
        self.engine: SocketServer | None = None
        self.app: FastAPI | None = None

    @asynccontextmanager
    async def run(self) -> AsyncIterator["Service"]:
        """Engine and application for the body of the `with`; version 1 is loaded."""
        socket = self.folder / "engine.sock"
        async with (
            running_engine(self.double, socket) as self.engine,
            connect(socket, silence_s=self.settings.request_timeout_s) as engine,
        ):
            gateway = Gateway(
                engine=engine, door=self.door, routes=self.routes, traffic=self.traffic, settings=self.settings
            )
            self.app = build_app(gateway, status=lambda: {"served": str(self.routes.served)})
            self.routes.serve(ONE)
            self.door.available()
            yield self

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Calls the application without a server; answers come whole."""
        assert self.app is not None
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield client

    @asynccontextmanager
    async def socket_client(self) -> AsyncIterator[httpx.AsyncClient]:
        """Calls the application through a real server, so that streams stream and connections break."""
        assert self.app is not None
        socket = self.folder / "gateway.sock"
        transport = httpx.AsyncHTTPTransport(uds=str(socket))
        async with (
            running(self.app, socket),
            httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=20) as client,
        ):
            yield client

    def count(self, name: str, **labels: str) -> float:
        """The value of a sample; 0 where it does not exist."""
        return self.registry.get_sample_value(name, labels) or 0.0
