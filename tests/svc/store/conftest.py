"""Provides the store of a test: each test runs with SQLite and with PostgreSQL."""

from pathlib import Path

import pytest
from sqlalchemy import Engine as Store

from tests.new_store import new_store


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "home")
