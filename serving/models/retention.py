"""Deletes jobs and batches a configured number of days after they ended, while the server is running."""

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from sqlalchemy import Engine as Store
from sqlalchemy import delete, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from serving.models.checkpoint_versions import job_of_checkpoints
from serving.telemetry.retention_clock import RetentionClock
from svc.store.database import is_sqlite, write_transaction
from svc.store.outage_log import log_store_error
from svc.store.statuses import BatchStatus, JobStatus
from svc.store.tables import BatchRow, JobRow

log = logging.getLogger(__name__)

_INTERVAL_S = 3600.0
_TOGETHER = 500
_ENDED_BATCHES = [status.value for status in BatchStatus if status.ended]
_ENDED_JOBS = [status.value for status in JobStatus if status.ended]


def newest_batch_at(store: Store) -> datetime | None:
    """Return the creation time of the newest batch, or None if there are no batches."""
    with Session(store) as session:
        return session.scalar(select(func.max(BatchRow.created_at)))


def newest_job_at(store: Store) -> datetime | None:
    """Return the creation time of the newest job, or None if there are no jobs."""
    with Session(store) as session:
        return session.scalar(select(func.max(JobRow.created_at)))


def remove_ended_batches(store: Store, before: datetime) -> int:
    """Delete the batches that ended before the given time, and return the number of deleted batches."""
    ended_at = func.coalesce(BatchRow.completed_at, BatchRow.failed_at, BatchRow.expired_at, BatchRow.cancelled_at)
    query = select(BatchRow.id).where(BatchRow.status.in_(_ENDED_BATCHES), ended_at < before)
    with Session(store) as session:
        ids = list(session.scalars(query))
    for start in range(0, len(ids), _TOGETHER):
        with write_transaction(store) as connection:
            connection.execute(delete(BatchRow).where(BatchRow.id.in_(ids[start : start + _TOGETHER])))
    return len(ids)


def remove_ended_jobs(
    store: Store, before: datetime, *, worker: str | None, registered: Callable[[], Collection[str]]
) -> int:
    """Delete the jobs that ended before the given time, with their events and checkpoints, and return the number of
    deleted jobs.

    A job whose model or checkpoints are registered is kept, because its row records which key may use them. Only a
    worker's own machine knows which versions it has registered, so the jobs of other workers are kept too.

    Args:
        worker: id of this machine's worker, or None if it has none.
        registered: function that returns the names of all registered models. It reads from disk.
    """
    columns = select(JobRow.id, JobRow.name, JobRow.status)
    # A job that its worker returned to the queue, where it was then cancelled, may have registered versions on any
    # machine.
    nowhere = JobRow.worker.is_(None) if is_sqlite(store) else JobRow.worker.is_(None) & JobRow.started_at.is_(None)
    own = nowhere | (JobRow.worker == (worker or ""))
    succeeded = JobRow.status == JobStatus.SUCCEEDED.value
    with Session(store) as session:
        ended = session.execute(columns.where(JobRow.status.in_(_ENDED_JOBS), JobRow.finished_at < before, own)).all()
        owned = set(session.scalars(select(JobRow.name).where(succeeded))) if ended else set()
    names = set(registered()) if ended else set()
    with_checkpoints = {job_of_checkpoints(name) for name in names}

    def is_needed(id: str, name: str, status: str) -> bool:
        shared = status != JobStatus.SUCCEEDED.value and name in owned  # another job's row says who owns it
        return id in with_checkpoints or (name in names and not shared)

    ids = [row.id for row in ended if not is_needed(row.id, row.name, row.status)]
    for start in range(0, len(ids), _TOGETHER):
        with write_transaction(store) as connection:
            connection.execute(delete(JobRow).where(JobRow.id.in_(ids[start : start + _TOGETHER])))
    return len(ids)


@dataclass(frozen=True, eq=False, kw_only=True)
class Retention:
    """Deletes ended jobs and batches. Several servers may run this concurrently.

    Attributes:
        batches_days, jobs_days: age at which batches and jobs are deleted, in days since their end.
        worker: id of this machine's worker, or None if it has none.
        registered: function that returns the names of all registered models. It reads from disk.
    """

    store: Store
    batches_days: float
    jobs_days: float
    worker: str | None
    registered: Callable[[], Collection[str]]

    async def run(self) -> None:
        """Delete ended jobs and batches every hour until cancelled."""
        batches = RetentionClock(timedelta(days=self.batches_days), rows="batches", setting="batches.max_age_days")
        jobs = RetentionClock(timedelta(days=self.jobs_days), rows="jobs", setting="fine_tuning.max_age_days")
        while True:
            try:
                await asyncio.to_thread(self._remove, batches, jobs)
            except SQLAlchemyError:
                log_store_error(log, "could not delete finished jobs and batches")
            except OSError:
                log.exception("could not delete finished jobs, because the registered models cannot be read")
            await asyncio.sleep(_INTERVAL_S)

    def _remove(self, batches: RetentionClock, jobs: RetentionClock) -> None:
        removed_batches = removed_jobs = 0
        if before := batches.oldest_kept(partial(newest_batch_at, self.store)):
            removed_batches = remove_ended_batches(self.store, before)
        if before := jobs.oldest_kept(partial(newest_job_at, self.store)):
            removed_jobs = remove_ended_jobs(self.store, before, worker=self.worker, registered=self.registered)
        if removed_batches or removed_jobs:
            log.info("deleted %d batches and %d jobs that ended long ago", removed_batches, removed_jobs)
