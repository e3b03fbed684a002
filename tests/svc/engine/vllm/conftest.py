"""What tests of an engine's connections need."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def socket() -> Iterator[Path]:
    """Where an engine listens; short, because the path of a unix socket has room for 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="svc") as folder:
        yield Path(folder) / "engine.sock"
