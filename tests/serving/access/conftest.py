"""Fixtures: a store in SQLite and in PostgreSQL, a keyring, and a clock that the test advances."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store

from serving.access.keyring import Keyring
from tests.builders.actors import ALICE


class Clock:
    """A clock that stands still until it is advanced."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 2, 12, tzinfo=UTC)

    def now(self) -> datetime:
        """Return the current time."""
        return self.at

    def monotonic(self) -> float:
        """Return the number of seconds since a fixed moment."""
        return self.at.timestamp()

    def forward(self, **span: float) -> None:
        """Advance the clock by the given time."""
        self.at += timedelta(**span)


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


@pytest.fixture
def clock() -> Clock:
    """Return a clock that is set to noon."""
    return Clock()


@pytest.fixture
def keyring(store: Store, clock: Clock) -> Keyring:
    """Return an empty keyring."""
    return Keyring(store, ALICE, now=clock.now)
