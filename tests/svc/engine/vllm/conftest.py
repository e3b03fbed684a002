"""Fixture for tests of an engine's connections."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def socket() -> Iterator[Path]:
    """Yield a short path for an engine's socket, because a Unix socket path is limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="svc") as folder:
        yield Path(folder) / "engine.sock"
