"""Fixtures for tests of batches."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from sqlalchemy import Engine as Store

from tests.serving.batches.batch_service import BatchService


@pytest.fixture
async def service(socket_folder: Path, store: Store) -> AsyncIterator[BatchService]:
    """Yield a gateway that runs batches."""
    service = BatchService(socket_folder, store=store)
    async with service.run():
        yield service


@pytest.fixture
async def client(service: BatchService) -> AsyncIterator[AsyncOpenAI]:
    """Yield the official client of the gateway."""
    async with service.official() as client:
        yield client
