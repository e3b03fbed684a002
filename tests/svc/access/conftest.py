"""A store in a folder of the test, keys in it, and a clock that the test moves."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine as Store

from svc.access.keyring import Keyring
from svc.identity.actor import Actor
from svc.store.database import open_database

ALICE = Actor("user:alice", "box")


class Clock:
    """A time that stands until it is moved."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 2, 12, tzinfo=UTC)

    def now(self) -> datetime:
        """The time."""
        return self.at

    def monotonic(self) -> float:
        """Seconds since some moment."""
        return self.at.timestamp()

    def forward(self, **span: float) -> None:
        """Lets time go by."""
        self.at += timedelta(**span)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return open_database(tmp_path / "home")


@pytest.fixture
def clock() -> Clock:
    """Noon."""
    return Clock()


@pytest.fixture
def keyring(store: Store, clock: Clock) -> Keyring:
    """An empty ring."""
    return Keyring(store, ALICE, now=clock.now)
