"""Creates, cancels, pauses and resumes fine-tuning jobs when their owners request it.

A client sends a request again if it receives no response. Therefore, a repeated creation returns the first job, and a
repeated change has no effect.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine as Store
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from serving.fine_tuning.rows import EventLevel, Job, Wanted, record_event
from serving.http.page import REPEAT_WINDOW, Page, find_row, owned_by, read_page, require_fewer
from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import RefusedError, SvcError
from svc.store.audit import AuditEntry, append_event
from svc.store.database import announce_change, exclusive
from svc.store.statuses import JobStatus
from svc.store.tables import FileRow, JobRow
from svc.version import VersionId

_OPEN = [status.value for status in JobStatus if not status.ended]
_CHUNK = 100


@answered_with(429, ErrorCode.RATE_LIMIT_EXCEEDED)
class TooManyJobsError(SvcError):
    """Raised when an owner has too many unfinished jobs."""


@answered_with(400, ErrorCode.JOB_ENDED)
class JobEndedError(RefusedError):
    """Raised on an attempt to change a job that has ended or is being cancelled."""


@dataclass(frozen=True, slots=True)
class JobError:
    """Reason why a job failed, as shown to its owner. It contains no paths on the server's machine.

    Attributes:
        param: field of the request that caused the failure, or None.
    """

    code: str
    message: str
    param: str | None = None


def find_repeated(store: Store, fingerprint: str, owner: str, *, max_jobs: int) -> Job | None:
    """Return the job that an identical request created, or None if a new job may be created.

    Args:
        max_jobs: maximum number of unfinished jobs of one owner.

    Raises:
        TooManyJobsError: the owner already has `max_jobs` unfinished jobs.
    """
    with Session(store) as session:
        row = _find_repeated(session, fingerprint, owner, max_jobs)
        return None if row is None else row.read(Job)


def create_job(
    store: Store, job: Job, entry: AuditEntry, *, max_jobs: int, training_s: float | None, events: Iterable[str]
) -> Job:
    """Add a job and return it, or return the job that an identical request created.

    Args:
        entry: audit event to record for the creation.
        max_jobs: maximum number of unfinished jobs of one owner.
        training_s: expected duration of the training in seconds, or None if unknown.
        events: messages of the job's first events.

    Raises:
        EntryNotFoundError: one of the job's files has been deleted.
        TooManyJobsError: the owner already has `max_jobs` unfinished jobs.
    """
    with exclusive(store) as session:
        row = _find_repeated(session, job.fingerprint, job.owner, max_jobs)
        if row is None:
            for param, file in (("training_file", job.training_file), ("validation_file", job.validation_file)):
                if file is not None:
                    find_row(session, FileRow, file, None, "file", param=param)
            finish = _estimate_finish(session, training_s)
            row = JobRow.of(job, estimated_finish=finish)
            session.add(row)
            session.flush()
            for message in events:
                record_event(session, row.id, message)
            append_event(session, entry)
            announce_change(session.connection())
        return row.read(Job)


def read_checking(store: Store) -> list[Job]:
    """Return the jobs whose files are being checked, oldest first."""
    query = select(JobRow).where(JobRow.status == JobStatus.VALIDATING_FILES.value).order_by(JobRow.created_at)
    with Session(store) as session:
        return [row.read(Job) for row in session.scalars(query)]


def queue_checked(store: Store, id: str, *, request: str, recipe: str, training_s: float, event: str) -> None:
    """Queue a job whose files have passed the check, unless the job has been cancelled.

    Args:
        request, recipe: new values of the job's fields.
        training_s: expected duration of its training, in seconds.
    """
    with exclusive(store) as session:
        if row := _checking(session, id):
            row.request, row.recipe, row.status = request, recipe, JobStatus.QUEUED.value
            row.estimated_finish = _estimate_finish(session, training_s) if row.wanted == Wanted.RUN.value else None
            record_event(session, row.id, event)
            announce_change(session.connection())


def fail_checked(store: Store, id: str, error: JobError) -> None:
    """Mark a job as failed because the check before queueing has shown that it cannot run.

    Does nothing if the job has been cancelled.
    """
    with exclusive(store) as session:
        if row := _checking(session, id):
            row.status, row.finished_at, row.estimated_finish = JobStatus.FAILED.value, datetime.now(UTC), None
            row.error = json.dumps(asdict(error))
            record_event(session, row.id, f"Fine-tuning job failed: {error.message}", EventLevel.ERROR)


def change_wanted(store: Store, id: str, owner: str | None, wanted: Wanted, entry: AuditEntry | None = None) -> Job:
    """Cancel, pause or resume a job, and return it.

    A job that no worker is running is cancelled immediately. Otherwise, its worker carries out the change.

    Args:
        owner: the owner whose jobs are searched; None for all owners.
        entry: audit event to record for the change, or None to record no event.

    Raises:
        EntryNotFoundError: the owner has no job with this id.
        JobEndedError: the job has already ended, or is being cancelled. Repeating a cancellation is not an error.
    """
    with exclusive(store) as session:
        row = find_row(session, JobRow, id, owner, "job")
        if row.wanted != wanted.value or JobStatus(row.status).ended:
            if row.status == JobStatus.CANCELLED.value and wanted is Wanted.CANCEL:
                return row.read(Job)
            _require_open(row)
            row.wanted = wanted.value
            _begin_change(session, row, wanted)
            if entry is not None:
                append_event(session, entry)
            announce_change(session.connection())
        return row.read(Job)


def find_jobs(
    store: Store, owner: str | None, *, page: Page, metadata: Mapping[str, str] | None
) -> tuple[list[Job], bool]:
    """Return one page of an owner's jobs with the given metadata, and whether another page follows.

    Args:
        owner: id of the owner, or None for the jobs of all owners.
        metadata: keys and values that a job's metadata must contain; None selects jobs without metadata.

    Raises:
        EntryNotFoundError: the owner has no job with the id `page.after`.
    """
    jobs, chunk, more = list[Job](), replace(page, limit=_CHUNK), True
    while more and len(jobs) <= page.limit:
        read, more = read_page(store, JobRow, Job, owned_by(JobRow, owner), chunk)
        jobs += [job for job in read if _has_metadata(job, metadata)]
        chunk = replace(chunk, after=read[-1].id if read else None)
    return jobs[: page.limit], len(jobs) > page.limit


def find_trained(store: Store, model: str, owner: str | None) -> VersionId | None:
    """Return the version with the given client name (`ft:...`) that an owner's job has trained, or None if there is
    none.

    Args:
        owner: id of the owner, or None for the models of all owners.
    """
    trained = JobRow.fine_tuned_model == model, JobRow.status == JobStatus.SUCCEEDED
    with Session(store) as session:
        row = session.scalar(select(JobRow).where(*trained, owned_by(JobRow, owner)))
        return None if row is None else row.read(Job).version


def _find_repeated(session: Session, fingerprint: str, owner: str, max_jobs: int) -> JobRow | None:
    is_open = JobRow.status.in_(_OPEN)
    recent = JobRow.created_at > datetime.now(UTC) - REPEAT_WINDOW
    equal = JobRow.fingerprint == fingerprint, JobRow.wanted != Wanted.CANCEL.value
    row = session.scalar(select(JobRow).where(*equal, is_open, recent).limit(1))
    if row is None:
        todo = "wait until a job has ended, or cancel a job"
        require_fewer(session, JobRow, owner, is_open, max_jobs, TooManyJobsError, noun="jobs", todo=todo)
    return row


def _estimate_finish(session: Session, training_s: float | None) -> datetime | None:
    """Estimate when a training run will finish if it starts after all other jobs."""
    if training_s is None:
        return None
    others = session.scalar(select(func.max(JobRow.estimated_finish)).where(JobRow.status.in_(_OPEN)))
    return max(datetime.now(UTC), others or datetime.min.replace(tzinfo=UTC)) + timedelta(seconds=training_s)


def _checking(session: Session, id: str) -> JobRow | None:
    return session.scalar(select(JobRow).where(JobRow.id == id, JobRow.status == JobStatus.VALIDATING_FILES.value))


def _require_open(row: JobRow) -> None:
    ended = JobStatus(row.status).ended
    if ended or row.wanted == Wanted.CANCEL.value:
        state = f"has already ended: {row.status}" if ended else "is being cancelled"
        raise JobEndedError(f"job {row.id} {state}", todo="create a new job to train again")


def _begin_change(session: Session, row: JobRow, wanted: Wanted) -> None:
    """Carry out the part of a change that does not need the job's worker."""
    running = row.status == JobStatus.RUNNING.value
    if wanted is Wanted.RUN:
        record_event(session, row.id, "Resuming the fine-tuning job was requested")
    elif not running:
        row.estimated_finish = None
        if wanted is Wanted.CANCEL:
            row.status, row.finished_at = JobStatus.CANCELLED.value, datetime.now(UTC)
        record_event(session, row.id, f"Fine-tuning job {'cancelled' if wanted is Wanted.CANCEL else 'paused'}")


def _has_metadata(job: Job, wanted: Mapping[str, str] | None) -> bool:
    metadata = json.loads(job.request).get("metadata")
    if wanted is None:
        return metadata is None
    return wanted.items() <= (metadata or {}).items()
