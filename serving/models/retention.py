"""Deletes jobs and batches a configured number of days after they ended, while the server is running."""

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.models.ended_work import newest_batch_at, newest_job_at, remove_ended_batches, remove_ended_jobs
from serving.telemetry.retention_clock import RetentionClock
from svc.store.outage_log import log_store_error

log = logging.getLogger(__name__)

_INTERVAL_S = 3600.0


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
