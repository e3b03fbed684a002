"""Fixtures of the serving tests."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving.service import Service


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """Short, because the path of a unix socket has room for 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="svc") as folder:
        yield Path(folder)


@pytest.fixture
async def service(socket_folder: Path) -> AsyncIterator[Service]:
    """The gateway in front of an engine that holds version 1."""
    async with Service(socket_folder).run() as service:
        yield service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """Calls the service; answers come whole."""
    async with service.client() as client:
        yield client
