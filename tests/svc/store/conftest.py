"""A store in a folder of the test."""

from pathlib import Path

import pytest
from sqlalchemy import Engine as Store

from tests.new_store import new_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return new_store(tmp_path / "home")
