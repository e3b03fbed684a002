"""Files of clients, one row each: what they uploaded, and results that the server wrote for them.

The contents are stored outside the database, see svc.client_files.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import Engine as Store
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from svc.store.page import Page, find_row, read_page
from svc.store.tables import FileRow


class Purpose(StrEnum):
    """What a file is for, in OpenAI's words."""

    FINE_TUNE = "fine-tune"
    FINE_TUNE_RESULTS = "fine-tune-results"
    BATCH = "batch"
    BATCH_OUTPUT = "batch_output"


class FileStatus(StrEnum):
    """Whether a file has been checked: not yet, and usable, or unusable."""

    UPLOADED = "uploaded"
    PROCESSED = "processed"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class ClientFile:
    """A file of a client.

    Attributes:
        owner: id of the key that owns the file; empty for requests without a key.
        filename: the client's name for the file, never used as a path.
        sha256: hash of the content, in hexadecimal.
        status_details: why the file is unusable, with line numbers.
    """

    id: str
    owner: str
    purpose: Purpose
    filename: str
    bytes: int
    sha256: str
    created_at: datetime
    expires_at: datetime | None = None
    status: FileStatus = FileStatus.UPLOADED
    status_details: str | None = None


def add_file(store: Store, file: ClientFile) -> None:
    """Add a file whose content has been stored."""
    with Session(store) as session, session.begin():
        session.add(FileRow.of(file))


def find_file(store: Store, id: str, owner: str | None) -> ClientFile:
    """Return a file.

    Args:
        owner: only a file of this owner is found; None for all owners.

    Raises:
        EntryNotFoundError: the owner has no file with this id.
    """
    with Session(store) as session:
        return find_row(session, FileRow, id, owner, "file").read(ClientFile)


def read_files(
    store: Store, owner: str | None, purposes: Collection[Purpose] = tuple(Purpose), *, page: Page
) -> tuple[list[ClientFile], bool]:
    """Return one page of an owner's files, and whether more follow.

    Args:
        owner: id of the owner, or None for the files of all owners.

    Raises:
        EntryNotFoundError: the page begins after a file that the owner does not have.
    """
    query = select(FileRow).where(FileRow.purpose.in_(purposes))
    rows, more = read_page(store, FileRow, query if owner is None else query.where(FileRow.owner == owner), page)
    return [row.read(ClientFile) for row in rows], more


def set_file_status(store: Store, id: str, status: FileStatus, details: str | None = None) -> None:
    """Record the result of checking a file, unless the file has been deleted."""
    with store.begin() as connection:
        connection.execute(update(FileRow).where(FileRow.id == id), {"status": status.value, "status_details": details})


def remove_file(store: Store, id: str) -> None:
    """Delete a file's row, if there is one."""
    with store.begin() as connection:
        connection.execute(delete(FileRow).where(FileRow.id == id))
