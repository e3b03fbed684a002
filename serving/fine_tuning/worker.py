"""The worker of a machine: takes fine-tuning jobs from the queue, and runs them one at a time.

Each job is run by `svc train` in a separate process, so that a crash of the server does not affect the training,
and vice versa. When a worker starts, it first resumes the job that it was running before the restart, if any. If
that job's process is still running, the worker continues to follow it.
"""

import asyncio
import logging
import math
import platform
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.files.client_files import ClientFiles
from serving.fine_tuning.job_training import (
    Complete,
    JobTraining,
    Pace,
    TrainingCommand,
    TrainingOptions,
    remove_epochs,
)
from serving.fine_tuning.queue import JobLostError, fail, take_job
from serving.fine_tuning.request_rows import JobError
from serving.fine_tuning.rows import Job, find_job
from serving.fine_tuning.training_check import command_environment
from serving.fine_tuning.training_process import TrainingProcess, end_processes
from serving.http.page import EntryNotFoundError
from serving.store_changes.changes import Changes
from svc.files.disk import write_whole
from svc.settings.client_apis import TrainingPlace
from svc.settings.settings import Settings
from svc.store.outage_log import log_store_error
from svc.store.statuses import JobStatus

log = logging.getLogger(__name__)

_WORKER_FILE = "worker"


def training_command(recipe: Path, progress: Path) -> Sequence[str]:
    """Return the command that trains a model from a recipe."""
    return (sys.executable, "-m", "svc.cli", "train", str(recipe), "--progress", str(progress))


def command_on_ray(recipe: Path, progress: Path) -> Sequence[str]:
    """Return the command that trains a model from a recipe on a Ray cluster. On Ray, the adapters of individual epochs
    are not kept.
    """
    return (*training_command(recipe, progress), "--on", "ray", "--set", "checkpoints.keep_epochs=0")


_COMMANDS: Mapping[TrainingPlace, TrainingCommand] = {
    TrainingPlace.HERE: training_command,
    TrainingPlace.RAY: command_on_ray,
}


def read_worker_id(folder: Path) -> str:
    """Return the id of the worker on this machine, which does not change across restarts.

    Args:
        folder: folder that contains the job folders; created if it does not exist.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / _WORKER_FILE
    try:
        own = path.read_text("utf-8")
    except FileNotFoundError:
        own = secrets.token_hex(8)
        write_whole(path, own.encode())
    return f"{platform.node()}/{own}"  # a copy of the home on another machine is another worker


class JobWorker:
    """Runs fine-tuning jobs on this machine, one at a time.

    Args:
        changes: notifications about changes in the store, which the worker waits for while the queue is empty.
        complete: function, called in a thread, that creates the result of a job that has succeeded.
        command: function that returns the command that trains a model from a recipe. By default, `fine_tuning.place`
            selects the function.

    Attributes:
        id: id of the worker on this machine, which does not change across restarts.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        files: ClientFiles,
        changes: Changes,
        *,
        complete: Complete,
        command: TrainingCommand | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.id = read_worker_id(settings.home.resolve() / "jobs")
        self._store = store
        self._files = files
        self._changes = changes
        self._folder = settings.home.resolve() / "jobs"
        self._pace = pace or Pace()
        self._options = TrainingOptions(
            store=store,
            files=files,
            worker=self.id,
            complete=complete,
            command=command or _COMMANDS[settings.fine_tuning.place],
            environment=command_environment(settings),
            pace=self._pace,
            wait=self._wait,
        )
        self._not_before = dict[str, float]()
        self._interrupted: JobTraining | None = None
        self._leaves = False

    def leave(self) -> None:
        """Make sure that cancelling `run` leaves the training running, so that the next server can continue it."""
        self._leaves = True

    async def run(self) -> None:
        """Run jobs until this task is cancelled. Unless `leave` was called, the training is then interrupted, and its
        job returns to the queue.

        Training that an earlier server left running is continued.
        """
        await asyncio.to_thread(self._end_foreign)
        while True:
            count = self._changes.count
            job = await self._take()
            if job is None:
                await self._changes.wait(count, self._pace.poll_s, within_s=self._retry_s())
            else:
                await self._train(job)

    async def _take(self) -> Job | None:
        try:
            return await asyncio.to_thread(take_job, self._store, self.id, self._may_run)
        except SQLAlchemyError:
            log_store_error(log, "could not read the queue of fine-tuning jobs")
            return None

    async def _train(self, job: Job) -> None:
        """Run a job. If the store or the disk fails, the job stays assigned to this worker, which tries again later."""
        training = self._interrupted
        if training is None or training.job.id != job.id:
            training = JobTraining(job, self._folder / job.id, self._options)
        training.job, self._interrupted = job, None
        try:
            await training.run()
        except asyncio.CancelledError:
            if not self._leaves:
                await training.stop()
            raise
        except JobLostError as error:
            log.warning("%s; stopping the job's training on this server", error)
            await training.kill()
        except SQLAlchemyError:
            self._interrupted = training
            log_store_error(log, "could not record the state of job %s; retrying", job.id)
            await asyncio.sleep(self._pace.poll_s)
        except OSError:
            self._interrupted = training
            log.exception("could not read or write a file of job %s; retrying", job.id)
            await asyncio.sleep(self._pace.poll_s)
        except Exception:
            log.exception("job %s failed because of an unexpected error in the server", job.id)
            await training.kill()
            await self._fail(job)

    async def _fail(self, job: Job) -> None:
        error = JobError("server_error", "the job failed because of a server error; see the server's log")
        try:
            await asyncio.to_thread(fail, self._store, job.id, self.id, error)
            await asyncio.to_thread(remove_epochs, self._folder / job.id)
        except (SQLAlchemyError, JobLostError):
            log_store_error(log, "could not record the failure of job %s", job.id)

    def _may_run(self, job: Job) -> bool:
        """Return whether a job's retry delay is over and its files are available on this machine."""
        if self._not_before.get(job.id, 0.0) > time.monotonic():
            return False
        ids = (id for id in (job.training_file, job.validation_file) if id is not None)
        return self._files.are_shared or all(self._files.path(id).exists() for id in ids)

    def _wait(self, job: Job) -> None:
        """Delay the next attempt at a job."""
        now = time.monotonic()
        self._not_before = {id: moment for id, moment in self._not_before.items() if moment > now}
        self._not_before[job.id] = now + self._pace.retry_s

    def _retry_s(self) -> float:
        """Return the time in seconds until a waiting job may be tried again; infinite if no job is waiting."""
        now = time.monotonic()
        return min((moment - now for moment in self._not_before.values() if moment > now), default=math.inf)

    def _end_foreign(self) -> None:
        """Kill the training runs on this machine whose jobs no longer belong to this worker."""
        for folder in self._folder.iterdir():
            if TrainingProcess.find(folder) is None:
                continue
            try:
                job = find_job(self._store, folder.name, None)
                own = job.status is JobStatus.RUNNING and job.worker == self.id
            except EntryNotFoundError:
                own = False
            except SQLAlchemyError:
                log_store_error(log, "could not read job %s", folder.name)
                own = True
            if not own:
                log.warning("stopping the training of %s: the job no longer belongs to this machine", folder.name)
                end_processes(folder)
