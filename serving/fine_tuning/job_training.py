"""Runs one fine-tuning job that this machine's worker has taken, from start to finish.

    is the job's process alive? ── no ──▶ start `svc train RECIPE --progress FILE`
               │ yes                                        │
               └────────────▶ follow the file ◀─────────────┘ ──▶ outcome ──▶ release, fail, succeed

Every step may be repeated after a crash of the server. If a training command that has already finished is started
again, it finds its stages complete, and ends with the same result.
"""

import asyncio
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.files.client_files import ClientFiles
from serving.files.shared_contents import ContentDamagedError, ContentMissingError, ContentStoreError
from serving.fine_tuning.queue import (
    MAX_ATTEMPTS,
    JobLostError,
    JobNews,
    JobResult,
    Reported,
    end_cancelled,
    fail,
    read_reported,
    read_wanted,
    release_job,
    report_job,
    succeed,
)
from serving.fine_tuning.recipe import file_keys, recipe_text, recipe_with_data, training_variables
from serving.fine_tuning.request import JobRequest
from serving.fine_tuning.request_rows import JobError
from serving.fine_tuning.results import PROGRESS_FILE
from serving.fine_tuning.rows import STAGE_BEGUN, Job, Wanted
from serving.fine_tuning.step_events import StepEvents
from serving.fine_tuning.training_error import read_error
from serving.fine_tuning.training_process import LOG_FILE, TrainingProcess, end_processes
from svc.errors import (
    BusyError,
    DiskSpaceError,
    InsufficientMemoryError,
    InterruptedRunError,
    RegistryError,
    ServerNotRunningError,
    TrainingError,
)
from svc.files.disk import write_whole
from svc.files.yaml_text import parse_yaml
from svc.store.outage_log import log_store_error
from svc.training_progress import (
    EPOCHS_FOLDER,
    ProgressReader,
    ProgressRecord,
    Registered,
    StageBegun,
    StepDone,
)
from svc.version import VersionId

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Complete = Callable[[Job, VersionId], JobResult]
"""Function that creates the result of a job whose version has been registered."""
TrainingCommand = Callable[[Path, Path], Sequence[str]]
"""Function that returns a training command, given the paths of the recipe and of the progress file to write."""

RECIPE_FILE = "recipe.yaml"
_WAITS = {
    InsufficientMemoryError.exit_code: "Waiting until the server has enough free memory",
    DiskSpaceError.exit_code: "Waiting until the server has enough free disk space",
    BusyError.exit_code: "Waiting until another process has finished the same training run, or the Ray cluster has "
    "free resources",
    ServerNotRunningError.exit_code: "Waiting until the Ray cluster can be reached",
}
"""Reasons why a job is retried later, keyed by the exit code of the training process."""
_WAITS_FOR_FILES = "Waiting until the object store for files is available"
_INTERRUPTED = {InterruptedRunError.exit_code, 130, -signal.SIGTERM, -signal.SIGINT}
_AGAIN = {RegistryError.exit_code}
"""Exit codes after which a job is retried, as if the training process had died."""
_KILLED = re.compile(r"exited with code -9\b|was killed by SIGKILL")
_LOG_BYTES = 20_000


@dataclass(frozen=True, slots=True)
class Pace:
    """Intervals and timeouts of a worker, in seconds.

    Attributes:
        poll_s: interval between two reads of the progress file and of the owner's requests.
        report_s: interval between two reports to the store when there is no new progress.
        event_s: interval between two events with metrics.
        retry_s: delay before another attempt at a job that had to wait.
        pause_s: time allowed for writing a checkpoint when a job is paused; after that, the training process is
            killed.
        stop_s: time allowed for writing a checkpoint when the server stops.
    """

    poll_s: float = 1.0
    report_s: float = 10.0
    event_s: float = 2.0
    retry_s: float = 60.0
    pause_s: float = 600.0
    stop_s: float = 40.0


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Options that all training runs of a worker share.

    Attributes:
        worker: id of the worker.
        environment: environment variables of the training commands.
        wait: function that makes the worker retry a job later.
    """

    store: Store
    files: ClientFiles
    worker: str
    complete: Complete
    command: TrainingCommand
    environment: Mapping[str, str]
    pace: Pace
    wait: Callable[[Job], None]


class JobTraining:
    """Runs a job that this worker has taken.

    Args:
        folder: the job's folder.

    Attributes:
        job: the job as it was when the worker took it.
    """

    def __init__(self, job: Job, folder: Path, options: TrainingOptions) -> None:
        self.job = job
        self._folder = folder
        self._options = options
        self._reader = ProgressReader(folder / PROGRESS_FILE)
        self._process: TrainingProcess | None = None
        self._steps = StepEvents(Reported(0, 0))
        self._stages: list[JobNews] = []
        self._newest: StepDone | None = None
        self._version: VersionId | None = None
        self._wanted = job.wanted
        self._kill_at: float | None = None
        self._reported_at = self._announced_at = float("-inf")

    async def run(self) -> None:
        """Run the job until it ends, or its owner cancels or pauses it. This may be called again after an error.

        Raises:
            JobLostError: another worker has taken the job.
            SQLAlchemyError: the store is not responding.
            OSError: the disk is full, or no file descriptor is free.
        """
        self._wanted = self.job.wanted
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._steps = StepEvents(await asyncio.to_thread(read_reported, self._options.store, self.job.id))
        if self._process is None:
            self._process = await asyncio.to_thread(TrainingProcess.find, self._folder)
        if not await self._begin():
            return
        while self._process is not None and self._process.running:
            await asyncio.sleep(self._options.pace.poll_s)
            await self._follow()
            if await self._obey():
                return
        await self._conclude()

    async def kill(self) -> None:
        """Kill all processes of the training run."""
        await asyncio.to_thread(self._process.kill if self._process else partial(end_processes, self._folder))

    async def stop(self) -> None:
        """Interrupt the training run because the server is stopping, and return its job to the queue."""
        try:
            if self._process is None:
                self._process = await asyncio.to_thread(TrainingProcess.find, self._folder)
            if self._process is not None and self._process.running:
                log.info("interrupting the training of %s, because the server is stopping", self.job.id)
                self._interrupt(self._options.pace.stop_s)
                while self._process.running and not self._is_late():
                    await asyncio.sleep(min(0.1, self._options.pace.poll_s))
                await asyncio.to_thread(self._process.kill)
            await self._conclude(stopping=True)
        except JobLostError as error:
            log.warning("%s", error)
        except SQLAlchemyError:
            log_store_error(log, "could not return job %s to the queue; this server will resume it", self.job.id)

    async def _begin(self) -> bool:
        """Start the training unless it is already running, and return whether it is running now."""
        adopted = self._process is not None
        self._note(await asyncio.to_thread(self._reader.read), replayed=True, adopted=adopted)
        if adopted:
            log.info("continuing the training of %s, which an earlier server started", self.job.id)
            return True
        await asyncio.to_thread(end_processes, self._folder)
        if self._wanted is Wanted.CANCEL:
            await self._end(end_cancelled)
            return False
        if self._wanted is Wanted.PAUSE:
            await self._release("Fine-tuning job paused")
            return False
        data = await self._data()
        if data is None:
            return False
        starting = asyncio.create_task(asyncio.to_thread(self._start, data))
        try:
            self._process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            with suppress(OSError):
                self._process = await starting  # `stop` must know the process
            raise
        except OSError:
            log.exception("could not start the training of %s", self.job.id)
            self._options.wait(self.job)
            await self._release(_WAITS[DiskSpaceError.exit_code])
            return False
        return True

    async def _data(self) -> dict[str, str] | None:
        """Return the paths of the job's files on this machine, keyed as in the recipe. Contents that are not on this
        machine are fetched first. Return None if the job cannot run here now, or has ended.
        """
        ids = file_keys(self.job.training_file, self.job.validation_file)
        try:
            return {key: str(await self._content(id)) for key, id in ids.items()}
        except ContentDamagedError as error:
            await self._end(fail, error=JobError("server_error", error.wrong))
        except (ContentMissingError, ContentStoreError, OSError) as error:
            log.warning("could not fetch the files of job %s: %s", self.job.id, error)
            self._options.wait(self.job)
            full = isinstance(error, OSError)
            await self._release(_WAITS[DiskSpaceError.exit_code] if full else _WAITS_FOR_FILES)
        return None

    async def _content(self, id: str) -> Path:
        """Return the path of a file's contents. While they are being fetched, the worker keeps reporting to the store,
        so that it does not lose the job.
        """
        fetching = asyncio.create_task(self._options.files.content(id))
        try:
            while not (await asyncio.wait([fetching], timeout=self._options.pace.report_s))[0]:
                await self._report([])
            return fetching.result()
        finally:
            fetching.cancel()

    def _start(self, data: Mapping[str, str]) -> TrainingProcess:
        request = JobRequest.model_validate_json(self.job.request)
        recipe = self._folder / RECIPE_FILE
        write_whole(recipe, recipe_text(recipe_with_data(parse_yaml(self.job.recipe), data)).encode())
        command = self._options.command(recipe, self._folder / PROGRESS_FILE)
        environment = {**self._options.environment, **training_variables(request)}
        return TrainingProcess.start(self._folder, command, environment)

    async def _follow(self) -> None:
        """Report the progress, and read the owner's requests.

        The training continues while the store is not responding. Once the store responds again, the worker learns
        whether the job still belongs to it.
        """
        try:
            self._note(await asyncio.to_thread(self._reader.read))
        except OSError:  # for example, no file descriptor is free
            log.exception("could not read the progress of job %s", self.job.id)
        process = self._process
        assert process is not None  # noqa: S101 - the caller has started it
        now, pace = time.monotonic(), self._options.pace
        news, self._stages = self._stages, []
        if now - self._announced_at >= pace.event_s and (event := self._steps.next()):
            news.append(event)
            self._announced_at = now
        try:
            if news or now - self._reported_at >= pace.report_s:
                await self._report(news)
                self._reported_at = now
                await asyncio.to_thread(process.note_descendants)
            else:
                self._wanted = await self._in_store(read_wanted)
        except SQLAlchemyError:
            log_store_error(log, "could not record the progress of job %s", self.job.id)

    async def _report(self, news: Sequence[JobNews]) -> None:
        newest = self._newest
        self._wanted = await self._in_store(
            report_job,
            left_s=newest.left_s if newest else None,
            trained_tokens=newest.tokens if newest else None,
            news=news,
        )

    def _note(self, records: Sequence[ProgressRecord], *, replayed: bool = False, adopted: bool = False) -> None:
        """Process new progress records of the training run.

        Args:
            replayed: whether an earlier server or attempt may already have processed the records.
            adopted: whether the process that wrote them is still running.
        """
        self._steps.add(records)
        for record in records:
            match record:
                case StepDone():
                    self._newest = record
                case StageBegun() if not replayed:
                    self._stages.append(JobNews(f"{STAGE_BEGUN}{record.name}"))
                case Registered() if adopted or not replayed:
                    self._version = VersionId.parse(record.version)

    async def _obey(self) -> bool:
        """Carry out the owner's request, and return whether this has ended the job."""
        assert self._process is not None  # noqa: S101 - the caller has started it
        if self._wanted is Wanted.CANCEL:
            await asyncio.to_thread(self._process.kill)
            await self._end(end_cancelled)
            return True
        if self._wanted is Wanted.PAUSE and self._kill_at is None:
            self._interrupt(self._options.pace.pause_s)
        if self._is_late():
            log.warning("the training run of %s did not write a checkpoint in time; killing it", self.job.id)
            await asyncio.to_thread(self._process.kill)
        return False

    def _interrupt(self, patience_s: float) -> None:
        assert self._process is not None  # noqa: S101 - the callers have started it
        if self._kill_at is None:  # a second signal would end it without a checkpoint
            self._process.interrupt()
        self._kill_at = time.monotonic() + patience_s

    def _is_late(self) -> bool:
        return self._kill_at is not None and time.monotonic() > self._kill_at

    async def _conclude(self, *, stopping: bool = False) -> None:
        """Record how the training ended."""
        code = self._process.exit_code if self._process is not None else None
        await self.kill()  # what a killed training process has left
        self._note(await asyncio.to_thread(self._reader.read))
        event = self._steps.next(last=True)
        await self._report([*self._stages, *([event] if event else [])])
        self._stages = []
        if self._wanted is Wanted.CANCEL:
            await self._end(end_cancelled)
        elif self._version is not None and code in (0, None):
            await self._complete(self._version)
        elif stopping:
            await self._release(
                "The server is stopping; the training continues when the server runs again", resumes_here=True
            )
        elif self._kill_at is not None or code in _INTERRUPTED:
            await self._release("The training was interrupted; the job returns to the queue")
        elif code is None:
            await self._release(
                "The training stopped while the server was not running; it continues now", resumes_here=True
            )
        elif code in _WAITS:
            self._options.wait(self.job)
            await self._release(_WAITS[code])
        elif self.job.attempts < MAX_ATTEMPTS and (code in _AGAIN or code < 0 or await self._child_was_killed(code)):
            log.warning(
                "the training process of %s exited with code %s; see %s", self.job.id, code, self._folder / LOG_FILE
            )
            self._options.wait(self.job)
            await self._release("The training process died; the training continues from its last checkpoint", died=True)
        else:
            await self._fail(code)

    async def _complete(self, version: VersionId) -> None:
        try:
            result = await asyncio.to_thread(self._options.complete, self.job, version)
        except OSError:
            log.exception("could not write the result of %s", self.job.id)
            self._options.wait(self.job)
            await self._release(_WAITS[DiskSpaceError.exit_code])
            return
        except ContentStoreError:
            self._options.wait(self.job)
            await self._release(_WAITS_FOR_FILES, resumes_here=True)
            return
        await self._end(succeed, version=version, result=result)
        log.info("job %s created %s", self.job.id, version)

    async def _fail(self, code: int) -> None:
        if code < 0:
            message = f"the training was killed {self.job.attempts} times, probably because memory ran out"
            error = JobError("server_error", message)
        else:
            error = read_error(code, await self._log())
        log.warning("job %s failed with exit code %s; see %s", self.job.id, code, self._folder / LOG_FILE)
        await self._end(fail, error=error)

    async def _child_was_killed(self, code: int) -> bool:
        """Return whether the operating system killed one of the training's processes, for example because memory ran
        out.
        """
        if code != TrainingError.exit_code:
            return False
        return _KILLED.search(read_error(code, await self._log()).message) is not None

    async def _log(self) -> str:
        return await asyncio.to_thread(_read_end, self._folder / LOG_FILE)

    async def _release(self, message: str, *, died: bool = False, resumes_here: bool = False) -> None:
        await self._in_store(release_job, message=message, died=died, resumes_here=resumes_here)

    async def _end(self, function: Callable[..., None], **values: Any) -> None:
        """Record the end of the job, then delete the adapters that were saved after each epoch.

        The order matters: if the server crashes before the end is recorded, the job's checkpoints are registered again
        from these adapters.
        """

        def end() -> None:  # in one thread, because the server may stop at any time
            function(self._options.store, self.job.id, self._options.worker, **values)
            remove_epochs(self._folder)

        await asyncio.to_thread(end)

    async def _in_store(self, function: Callable[..., Result], **values: Any) -> Result:
        """In a thread, call a function from serving.fine_tuning.queue for this job."""
        options = self._options
        return await asyncio.to_thread(partial(function, options.store, self.job.id, options.worker, **values))


def remove_epochs(folder: Path) -> None:
    """Delete the adapters that were saved at the end of each of a job's epochs. The job's checkpoints are not affected,
    because they are versions in the registry.
    """
    shutil.rmtree(folder / EPOCHS_FOLDER, ignore_errors=True)


def _read_end(path: Path) -> str:
    """Return the last `_LOG_BYTES` of a log, or an empty string if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
