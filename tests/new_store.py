"""The store of a new home, as a copy of one that was migrated: to migrate takes longer than most tests."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import Engine as Store

from svc.store.database import open_database


def new_store(home: Path) -> Store:
    """Opens the store of a home as the service does, which finds nothing to migrate; one that is there stays."""
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
