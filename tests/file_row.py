"""Adds the row of a client's file, for tests that do not need its content."""

from datetime import UTC, datetime

from sqlalchemy import Engine as Store

from serving.files.rows import ClientFile, Purpose
from svc.store.database import exclusive
from svc.store.tables import FileRow


def add_file_row(store: Store, id: str, *, owner: str = "alice", purpose: Purpose = Purpose.FINE_TUNE) -> None:
    """Add the row of a file, unless there is one with this id."""
    with exclusive(store) as session:
        if session.get(FileRow, id) is None:
            session.add(FileRow.of(ClientFile(id, owner, purpose, "a.jsonl", 3, "0" * 64, datetime.now(UTC))))
