"""Provides the store of a new home as a copy of a migrated one, as migration is slower than most tests."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import Engine as Store

from svc.store.database import open_database


def new_store(home: Path) -> Store:
    """Open a home's store as the service does, so that there is nothing to migrate. An existing store is kept."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / "svc.db"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_bytes(_migrated())
    return open_database(home)


@cache
def _migrated() -> bytes:
    with TemporaryDirectory(prefix="svc") as folder:
        open_database(Path(folder)).dispose()  # the last connection takes SQLite's other files with it
        return (Path(folder) / "svc.db").read_bytes()
