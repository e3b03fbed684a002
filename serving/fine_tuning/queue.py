"""The queue of fine-tuning jobs. Workers on one or several machines take jobs from it, report their progress, and end
them.

                    take_job               succeed, fail, end_cancelled
        queued ───────────────▶ running ───────────────────────────────▶ succeeded, failed, cancelled
           ▲                       │
           └───────────────────────┘
              release_job, or the worker has not reported for a minute

All decisions use the database's clock, so the machines' clocks need not agree.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from serving.fine_tuning.request_rows import JobError
from serving.fine_tuning.rows import EventLevel, EventType, Job, Wanted, record_event
from svc.store.database import announce_change, exclusive
from svc.store.leases import database_time
from svc.store.statuses import JobStatus
from svc.store.tables import JobEventRow, JobRow
from svc.version import VersionId

ABANDONED_AFTER = timedelta(minutes=1)
"""A running job returns to the queue if its worker has not reported for this long."""
MAX_ATTEMPTS = 3
"""A job fails when its training process has died this many times. Interruptions for other reasons are not counted."""
_RUNNING, _QUEUED = JobStatus.RUNNING.value, JobStatus.QUEUED.value


class JobLostError(Exception):
    """Raised when a worker reports on a job that has ended or that another worker has taken, for example because the
    first worker lost its connection to the store."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """Result of a job that has succeeded.

    Attributes:
        fine_tuned_model: the version's name for clients.
        result_file: id of the file with the metrics, or None.
    """

    fine_tuned_model: str
    result_file: str | None = None


@dataclass(frozen=True, slots=True)
class JobNews:
    """An event that a worker reports. `metrics` contains the metrics of a step if the event has the type `metrics`."""

    message: str
    metrics: Mapping[str, Any] | None = None
    level: EventLevel = EventLevel.INFO


@dataclass(frozen=True, slots=True)
class Reported:
    """Summary of the steps that were reported for a job.

    Attributes:
        events: number of events with metrics.
        step: the last reported step, or 0.
    """

    events: int
    step: int


def take_job(store: Store, worker: str, may_run: Callable[[Job], bool]) -> Job | None:
    """Take a job and return it, or return None if no job can be taken.

    A job that the store still records as running on this worker, because the worker's previous process took it, comes
    first. A queued job that this worker had to interrupt comes second. Otherwise, the worker takes a queued job of the
    owner with the fewest running jobs, so that the machines are shared fairly among keys. Among owners with equally few
    running jobs, the owner whose last job started longest ago comes first.

    Args:
        worker: id of the worker, which runs one job at a time.
        may_run: function that returns whether this worker can run a queued job.
    """
    with Session(store) as session:  # without the write lock, because an idle worker asks often
        if not _abandoned(session, worker) and _choose(session, worker, may_run) is None:
            return None
    with exclusive(store) as session:
        now = database_time(session)
        for abandoned in _abandoned(session, worker):
            _release(session, abandoned, "The job's worker is not responding; the job returns to the queue", now)
            abandoned.attempts -= 1
        row = _choose(session, worker, may_run)
        if row is None:
            return None
        if row.status == _QUEUED:
            row.status, row.started_at, row.attempts = _RUNNING, now, row.attempts + 1
            _record_new(session, row.id, "Fine-tuning job started")
        row.worker, row.seen_at = worker, now
        return row.read(Job)


def read_wanted(store: Store, id: str, worker: str) -> Wanted:
    """Return the owner's latest request for a running job: to continue, pause or cancel it.

    Raises:
        JobLostError: the job no longer belongs to this worker.
    """
    with Session(store) as session:
        return Wanted(_own(session, id, worker).wanted)


def report_job(
    store: Store,
    id: str,
    worker: str,
    *,
    left_s: float | None = None,
    trained_tokens: int | None = None,
    news: Sequence[JobNews] = (),
) -> Wanted:
    """Record that a worker is still running a job, and return the owner's latest request; see `read_wanted`.

    Args:
        left_s: expected remaining training time in seconds, or None to leave the expected end unchanged.
        trained_tokens: number of tokens trained on so far, or None to leave it unchanged.
        news: events to add.

    Raises:
        JobLostError: the job no longer belongs to this worker.
    """
    with exclusive(store) as session:
        row = _own(session, id, worker)
        row.seen_at = database_time(session)
        if left_s is not None:
            row.estimated_finish = row.seen_at + timedelta(seconds=left_s)
        if trained_tokens is not None:
            row.trained_tokens = trained_tokens
        for event in news:
            record_event(session, id, event.message, event.level, event.metrics)
        return Wanted(row.wanted)


def release_job(
    store: Store, id: str, worker: str, message: str, *, died: bool = False, resumes_here: bool = False
) -> None:
    """Return a running job to the queue. A job that its owner has paused waits in the queue until it is resumed, and a
    job that its owner has cancelled ends.

    Args:
        message: message of an event that states the reason. The event is omitted if it repeats one of the last two
            events.
        died: whether the training process died, in which case the attempt is counted.
        resumes_here: whether this worker should resume the job before it takes other jobs.

    Raises:
        JobLostError: the job no longer belongs to this worker.
    """
    with exclusive(store) as session:
        row = _own(session, id, worker)
        if not died:
            row.attempts -= 1
        _release(session, row, message, database_time(session))
        if resumes_here:
            row.worker = worker


def succeed(store: Store, id: str, worker: str, version: VersionId, result: JobResult) -> None:
    """End a job whose version has been registered.

    Raises:
        JobLostError: the job no longer belongs to this worker.
    """
    with exclusive(store) as session:
        row = _own(session, id, worker)
        row.number, row.fine_tuned_model, row.result_file = version.number, result.fine_tuned_model, result.result_file
        record_event(session, id, f"The model is registered as {version}")
        record_event(session, id, f"New fine-tuned model created: {result.fine_tuned_model}")
        _end(session, row, JobStatus.SUCCEEDED, "The job has successfully completed")


def fail(store: Store, id: str, worker: str, error: JobError) -> None:
    """End a job whose training has failed.

    Raises:
        JobLostError: the job no longer belongs to this worker.
    """
    with exclusive(store) as session:
        row = _own(session, id, worker)
        row.error = json.dumps(asdict(error))
        _end(session, row, JobStatus.FAILED, f"Fine-tuning job failed: {error.message}", EventLevel.ERROR)


def end_cancelled(store: Store, id: str, worker: str) -> None:
    """End a job whose owner has cancelled it, once its training has been stopped.

    Raises:
        JobLostError: the job no longer belongs to this worker.
    """
    with exclusive(store) as session:
        _end(session, _own(session, id, worker), JobStatus.CANCELLED, "Fine-tuning job cancelled")


def read_reported(store: Store, id: str) -> Reported:
    """Return a summary of the steps that were reported for a job."""
    metrics = (JobEventRow.job == id) & (JobEventRow.type == EventType.METRICS.value)
    with Session(store) as session:
        count = session.scalar(select(func.count()).select_from(JobEventRow).where(metrics)) or 0
        newest = select(JobEventRow.data).where(metrics).order_by(JobEventRow.id.desc()).limit(1)
        data = session.scalar(newest)
        return Reported(count, 0 if data is None else json.loads(data)["step"])


def _abandoned(session: Session, worker: str) -> Sequence[JobRow]:
    """Return the running jobs whose worker is not the given one and has stopped reporting."""
    before = database_time(session) - ABANDONED_AFTER
    silent = JobRow.seen_at.is_(None) | (JobRow.seen_at < before)
    return session.scalars(select(JobRow).where(JobRow.status == _RUNNING, JobRow.worker != worker, silent)).all()


def _choose(session: Session, worker: str, may_run: Callable[[Job], bool]) -> JobRow | None:
    """Return the job that a worker should run next, or None if there is no such job."""
    own = session.scalar(select(JobRow).where(JobRow.status == _RUNNING, JobRow.worker == worker).limit(1))
    if own is not None:
        return own
    waiting = select(JobRow).where(JobRow.status == _QUEUED, JobRow.wanted == Wanted.RUN.value)
    rows = session.scalars(waiting.order_by(JobRow.created_at, JobRow.id)).all()
    if not rows:
        return None
    counts = select(JobRow.owner, func.count()).where(JobRow.status == _RUNNING).group_by(JobRow.owner)
    running = dict(session.execute(counts).all())
    started = select(JobRow.owner, func.max(JobRow.started_at)).where(JobRow.owner.in_({row.owner for row in rows}))
    last = dict(session.execute(started.group_by(JobRow.owner)).all())
    never = datetime.min.replace(tzinfo=UTC)

    def turn(row: JobRow) -> tuple[bool, int, datetime]:
        return row.worker != worker, running.get(row.owner, 0), last[row.owner] or never

    return next((row for row in sorted(rows, key=turn) if may_run(row.read(Job))), None)


def _own(session: Session, id: str, worker: str) -> JobRow:
    row = session.get(JobRow, id)
    if row is None or row.status != _RUNNING or row.worker != worker:
        raise JobLostError(f"job {id} no longer belongs to worker {worker}")
    return row


def _release(session: Session, row: JobRow, message: str, now: datetime) -> None:
    row.status, row.worker, row.seen_at = _QUEUED, None, None
    if row.wanted == Wanted.CANCEL.value:
        _end(session, row, JobStatus.CANCELLED, "Fine-tuning job cancelled")
        return
    if row.wanted == Wanted.PAUSE.value:
        row.estimated_finish, message = None, "Fine-tuning job paused"
    elif row.estimated_finish is not None:
        row.estimated_finish = max(row.estimated_finish, now)
    _record_new(session, row.id, message)
    announce_change(session.connection())  # another worker may take it


def _record_new(session: Session, id: str, message: str) -> None:
    """Add an event, unless it repeats one of the last two events, as happens when a job repeatedly fails to start."""
    last = select(JobEventRow.message).where(JobEventRow.job == id).order_by(JobEventRow.id.desc()).limit(2)
    if message not in session.scalars(last).all():
        record_event(session, id, message)


def _end(session: Session, row: JobRow, status: JobStatus, message: str, level: EventLevel = EventLevel.INFO) -> None:
    row.status, row.finished_at, row.estimated_finish = status.value, datetime.now(UTC), None
    record_event(session, row.id, message, level)
