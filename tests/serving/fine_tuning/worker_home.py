"""A home with queued fine-tuning jobs, and a worker whose trainings are fake."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import yaml
from sqlalchemy import Engine as Store
from sqlalchemy import update

from serving.files.client_files import ClientFiles
from serving.files.rows import Purpose
from serving.fine_tuning.job_training import Pace
from serving.fine_tuning.queue import JobResult
from serving.fine_tuning.recipe import recipe_text
from serving.fine_tuning.request_rows import change_wanted, create_job
from serving.fine_tuning.rows import Job, Wanted, find_job, read_events
from serving.fine_tuning.worker import JobWorker
from serving.http.page import Page
from serving.store_changes.changes import Changes
from svc.engine.orphans import runs
from svc.settings.settings import Settings
from svc.store.audit import Action, AuditEntry
from svc.store.statuses import JobStatus
from svc.store.tables import JobRow
from svc.version import VersionId
from tests.builders.actors import ALICE_KEY
from tests.file_row import add_file_row

FAKE_TRAINING = Path(__file__).with_name("fake_training.py")
PACE = Pace(poll_s=0.05, event_s=0.0, retry_s=0.3, pause_s=1.0, stop_s=1.0)
PATIENCE_S = 240.0
_NUMBERS = count(1)


def fake_command(recipe: Path, progress: Path) -> list[str]:
    """Return the command of the fake training."""
    return [sys.executable, str(FAKE_TRAINING), str(recipe), str(progress)]


def fake_result(job: Job, version: VersionId) -> JobResult:
    return JobResult(f"ft:small:org::{job.id}", "file-result")


@dataclass
class WorkerHome:
    """A home, with its store and its clients' files."""

    store: Store
    folder: Path

    def __post_init__(self) -> None:
        self.files = ClientFiles(self.store, self.folder / "files")
        self.settings = Settings(home=self.folder)
        self.changes = Changes()
        with self.files.writing() as (id, writer):
            writer.write(b"{}\n")
            self.files.add(id, writer, owner="alice", purpose=Purpose.FINE_TUNE, filename="a.jsonl")
        self.file = id

    def add(self, owner: str = "alice", *, file: str | None = None, **fake: Any) -> str:
        """Add a queued job.

        Args:
            fake: what its training does, see `tests.serving.fine_tuning.fake_training`.
        """
        number = next(_NUMBERS)
        recipe = {"name": f"bot-{number}", "data": {"train": "/elsewhere/files/file-1"}, "fake": fake}
        job = Job(
            id=f"ftjob-{number}",
            owner=owner,
            fingerprint=f"print-{number}",
            model="small",
            training_file=file or self.file,
            request=json.dumps({"model": "small", "training_file": self.file}),
            recipe=yaml.safe_dump(recipe),
            name=f"bot-{number}",
            created_at=datetime.now(UTC) + timedelta(microseconds=number),
            status=JobStatus.QUEUED,
        )
        add_file_row(self.store, job.training_file, owner=owner)
        entry = AuditEntry(Action.CREATE_JOB, job.id, ALICE_KEY)
        return create_job(self.store, job, entry, max_jobs=100, training_s=None, events=[]).id

    def worker(self, **options: Any) -> JobWorker:
        values: dict[str, Any] = {"complete": fake_result, "command": fake_command, "pace": PACE} | options
        return JobWorker(self.store, self.settings, self.files, self.changes, **values)

    @asynccontextmanager
    async def working(self, worker: JobWorker | None = None) -> AsyncIterator[None]:
        """Run a worker in the context."""
        task = asyncio.create_task((worker or self.worker()).run())
        try:
            yield
            assert not task.done(), task
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def job(self, id: str) -> Job:
        return find_job(self.store, id, None)

    def want(self, id: str, wanted: Wanted) -> None:
        change_wanted(self.store, id, None, wanted)

    def messages(self, id: str) -> list[str]:
        events, _ = read_events(self.store, id, page=Page(1000, newest_first=False))
        return [event.message for event in events]

    def job_folder(self, id: str) -> Path:
        return self.folder / "jobs" / id

    def starts(self, id: str) -> list[int]:
        """Return the ids of the processes that have been started for a job."""
        path = self.job_folder(id) / "starts"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def step(self, id: str) -> int:
        """Return the last step of a job's fake training."""
        with suppress(FileNotFoundError, ValueError):
            return int((self.job_folder(id) / "checkpoint").read_text())
        return 0

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "the condition was not met in time"
            await asyncio.sleep(0.02)

    async def ended(self, *ids: str) -> None:
        await self.until(lambda: all(self.job(id).status.ended for id in ids))


def lives(pid: int) -> bool:
    """Return whether a process runs and is not a zombie."""
    try:
        return runs(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    """Run a worker of a home until the process is killed, as a server does. SIGUSR1 leaves its training running."""
    from tests.new_store import new_store

    home = Path(sys.argv[1])
    os.chdir(home)
    worker = WorkerHome(new_store(home), home).worker()

    async def run() -> None:
        task = asyncio.create_task(worker.run())

        def leave() -> None:
            worker.leave()
            task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, leave)
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())


if __name__ == "__main__":
    main()


def add_real_job(home: WorkerHome, base: Path, epochs: int) -> str:
    """Queue a job that the real `svc train` can run, named ft-alice-tiny, and return its id."""
    recipe = {
        "name": "ft-alice-tiny",
        "base": str(base),
        "formats": ["adapter"],
        "data": {"train": "/elsewhere/files/file-1"},
        "adapter": {"rank": 4},
        "train": {"batch_size": 2, "epochs": epochs, "learning_rate": 0.01},
        "checkpoints": {"keep_epochs": 3},
    }
    id = home.add()
    with home.store.begin() as connection:
        values = {"recipe": recipe_text(recipe), "name": "ft-alice-tiny"}
        connection.execute(update(JobRow).where(JobRow.id == id).values(values))
    return id
