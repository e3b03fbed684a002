"""Provides the store of a test: each test runs with SQLite and with PostgreSQL."""

import pytest
from sqlalchemy import Engine as Store


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store
