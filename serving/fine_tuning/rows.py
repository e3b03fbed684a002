"""Fine-tuning jobs, with one row per job, and their events and checkpoints.

A job's owner creates it, and can cancel, pause or resume it. A worker takes it from the queue
(serving.fine_tuning.queue), and records its progress and result.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from serving.http.page import Page, find_row, owned_by, read_page
from svc.store.database import exclusive
from svc.store.statuses import JobStatus
from svc.store.tables import JobCheckpointRow, JobEventRow, JobRow
from svc.version import VersionId

STAGE_BEGUN = "Stage begun: "
"""Prefix of the message of a job event that reports the start of a training stage. The stage's name follows."""


class Wanted(StrEnum):
    """The action that a job's owner requested last. A paused job has the status `queued`, and no worker takes it."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


class EventLevel(StrEnum):
    """Severity of an event."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class EventType(StrEnum):
    """Type of an event: a message for people, or a step's metrics."""

    MESSAGE = "message"
    METRICS = "metrics"


@dataclass(frozen=True, slots=True)
class Job:
    """A fine-tuning job.

    Attributes:
        owner: id of the key that created the job; empty for requests without a key.
        fingerprint: hash of the owner and the request. A client's retry has the same fingerprint.
        model: name of the base model, as given by the client.
        request: the client's request, as JSON.
        recipe: the training recipe, as YAML. It contains the base model's name and the training file's path.
        name: model name under which the version is registered.
        worker: the worker that runs the job, or None.
        seen_at: time of that worker's last report.
        attempts: number of the current attempt. Attempts that were interrupted without failing are not counted.
        number: version number, or None until the version is registered.
        fine_tuned_model: the version's name for clients, `ft:BASE:ORG:SUFFIX:ID`.
        error: `{"code", "message", "param"}` as JSON, or None unless the job failed.
    """

    id: str
    owner: str
    fingerprint: str
    model: str
    training_file: str
    request: str
    recipe: str
    name: str
    created_at: datetime
    validation_file: str | None = None
    status: JobStatus = JobStatus.VALIDATING_FILES
    wanted: Wanted = Wanted.RUN
    started_at: datetime | None = None
    finished_at: datetime | None = None
    estimated_finish: datetime | None = None
    worker: str | None = None
    seen_at: datetime | None = None
    attempts: int = 0
    trained_tokens: int | None = None
    number: int | None = None
    fine_tuned_model: str | None = None
    result_file: str | None = None
    error: str | None = None

    @property
    def version(self) -> VersionId | None:
        """The registered version, or None before the registration."""
        return None if self.number is None else VersionId(self.name, self.number)


@dataclass(frozen=True, slots=True)
class JobEvent:
    """An event of a job. `data` is JSON, or None."""

    id: int
    at: datetime
    level: EventLevel
    type: EventType
    message: str
    data: str | None = None


@dataclass(frozen=True, slots=True)
class JobCheckpoint:
    """A checkpoint that clients can chat with.

    Attributes:
        model: the checkpoint's name for clients.
        metrics: its metrics under OpenAI's names, as JSON.
    """

    id: str
    job: str
    created_at: datetime
    step: int
    model: str
    metrics: str


def find_job(store: Store, id: str, owner: str | None) -> Job:
    """Return the job with the given id.

    Args:
        owner: the owner whose jobs are searched; None for all owners.

    Raises:
        EntryNotFoundError: the owner has no job with this id.
    """
    with Session(store) as session:
        return find_row(session, JobRow, id, owner, "job").read(Job)


def read_jobs(store: Store, owner: str | None, *, page: Page) -> tuple[list[Job], bool]:
    """Return one page of an owner's jobs, and whether another page follows.

    Args:
        owner: id of the owner, or None for the jobs of all owners.
    """
    return read_page(store, JobRow, Job, owned_by(JobRow, owner), page)


def add_event(
    store: Store,
    job: str,
    message: str,
    *,
    level: EventLevel = EventLevel.INFO,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Add an event to a job.

    Args:
        metrics: metrics of a step, for an event of the type `metrics`.
    """
    with exclusive(store) as session:
        record_event(session, job, message, level, metrics)


def record_event(
    session: Session,
    job: str,
    message: str,
    level: EventLevel = EventLevel.INFO,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Add an event to a job in a transaction that holds the write lock."""
    event = JobEventRow(
        job=job,
        at=datetime.now(UTC),
        level=level.value,
        type=(EventType.MESSAGE if metrics is None else EventType.METRICS).value,
        message=message,
        data=None if metrics is None else json.dumps(dict(metrics)),
    )
    session.add(event)
    session.flush()  # ids in the order of the events


def read_events(store: Store, job: str, *, page: Page) -> tuple[list[JobEvent], bool]:
    """Return one page of a job's events, and whether another page follows."""
    return read_page(store, JobEventRow, JobEvent, JobEventRow.job == job, page)


def add_checkpoint(store: Store, checkpoint: JobCheckpoint) -> None:
    """Add a checkpoint to a job, unless the job already has it."""
    with exclusive(store) as session:
        if session.get(JobCheckpointRow, checkpoint.id) is None:
            session.add(JobCheckpointRow.of(checkpoint))


def read_checkpoints(store: Store, job: str, *, page: Page) -> tuple[list[JobCheckpoint], bool]:
    """Return one page of a job's checkpoints, and whether another page follows."""
    return read_page(store, JobCheckpointRow, JobCheckpoint, JobCheckpointRow.job == job, page)
