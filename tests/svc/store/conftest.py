"""Provides a store in the test's folder."""

from pathlib import Path

import pytest
from sqlalchemy import Engine as Store

from tests.new_store import new_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "home")
