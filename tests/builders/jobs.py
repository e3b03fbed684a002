"""Builds fine-tuning jobs as clients create them and as workers change them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import count
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy import update

from serving.fine_tuning.request_rows import create_job
from serving.fine_tuning.rows import Job, read_events
from serving.http.page import Page
from svc.store.audit import Action, AuditEntry
from svc.store.statuses import JobStatus
from svc.store.tables import JobRow
from tests.builders.actors import ALICE_KEY
from tests.file_row import add_file_row

_NUMBERS = count(1)


def queued_job(**fields: Any) -> Job:
    """Return a queued job of the key `alice`, without adding it to a store."""
    number = next(_NUMBERS)
    defaults: dict[str, Any] = {
        "id": f"ftjob-{number}",
        "owner": "alice",
        "fingerprint": f"print-{number}",
        "model": "small",
        "training_file": "file-1",
        "request": "{}",
        "recipe": "name: ft-alice-small\n",
        "name": "ft-alice-small",
        "created_at": datetime.now(UTC),
        "status": JobStatus.QUEUED,
    }
    return Job(**(defaults | fields))


def add_job(
    store: Store,
    *,
    max_jobs: int = 100,
    training_s: float | None = None,
    events: Sequence[str] = ("created", "queued"),
    **fields: Any,
) -> Job:
    """Create a queued job of the key `alice`, and the row of the file `file-1`.

    Args:
        max_jobs: how many unfinished jobs the owner may have.
        training_s: estimated time of the training in seconds.
        events: messages of the job's first events.
        fields: fields of the job that differ from the defaults.
    """
    job = queued_job(**fields)
    add_file_row(store, "file-1")
    entry = AuditEntry(Action.CREATE_JOB, job.id, ALICE_KEY)
    return create_job(store, job, entry, max_jobs=max_jobs, training_s=training_s, events=events)


def change_job(store: Store, id: str, **columns: Any) -> None:
    """Change columns of a job, as its worker does."""
    with store.begin() as connection:
        connection.execute(update(JobRow).where(JobRow.id == id).values(columns))


def end_job(store: Store, id: str, status: JobStatus, at: datetime, **columns: Any) -> None:
    """End a job at a time."""
    change_job(store, id, status=status.value, finished_at=at, **columns)


def messages(store: Store, id: str) -> list[str]:
    """Return the messages of a job's first hundred events, oldest first."""
    events, _ = read_events(store, id, page=Page(100, newest_first=False))
    return [event.message for event in events]
