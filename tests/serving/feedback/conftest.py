"""Provides a store in the test's folder."""

from pathlib import Path

import pytest
from sqlalchemy import Engine as Store

from svc.store.database import open_database


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return an empty store in a place where `svc` in the same folder finds it."""
    return open_database(tmp_path / ".svc")
