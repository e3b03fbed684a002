"""A running server deletes the jobs and batches that ended long ago."""

import asyncio
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine as Store

from serving.batches.rows import read_batches
from serving.fine_tuning.rows import read_jobs
from serving.http.page import Page
from serving.models.retention import Retention
from svc.store.statuses import BatchStatus, JobStatus
from tests.builders.batches import add_batch, end_batch
from tests.builders.jobs import add_job, end_job
from tests.serving.control import until


async def test_server_deletes_finished_jobs_and_batches_at_the_configured_age(store: Store) -> None:
    now = datetime.now(UTC)
    batches, jobs = [add_batch(store) for _ in range(2)], [add_job(store, name=f"ft-{n}") for n in range(2)]
    for age, batch, job in zip((1, 9), batches, jobs, strict=True):
        end_batch(store, batch, BatchStatus.COMPLETED, now - timedelta(days=age * 2))
        end_job(store, job.id, JobStatus.FAILED, now - timedelta(days=age))
    retention = Retention(store=store, batches_days=10.0, jobs_days=5.0, worker=None, registered=list)
    running = asyncio.create_task(retention.run())
    await until(lambda: len(read_jobs(store, None, page=Page(10))[0]) == 1)
    assert [batch.id for batch in read_batches(store, None, page=Page(10))[0]] == [batches[0].id]
    assert [job.id for job in read_jobs(store, None, page=Page(10))[0]] == [jobs[0].id]
    running.cancel()
