"""The worker trains on files whose contents are in an object store, and waits while that does not answer."""

import asyncio
from pathlib import Path

import pytest

from serving.files.client_files import ClientFiles
from serving.files.shared_contents import ContentDamagedError, ContentStoreError
from serving.fine_tuning.job_training import Pace
from serving.fine_tuning.queue import JobResult
from serving.fine_tuning.rows import Job, Wanted
from svc.settings.settings import Settings
from svc.settings.storage import ArtifactSettings
from svc.store.statuses import JobStatus
from svc.version import VersionId
from tests.new_store import new_store
from tests.serving.fine_tuning.worker_home import PACE, WorkerHome, fake_result

pytestmark = pytest.mark.slow

AWAY = ContentStoreError("the object store is not responding")
DAMAGED = ContentDamagedError("client-files/file-1 was altered")
WAITS = "Waiting until the object store for files is available"


@pytest.fixture
def home(tmp_path: Path) -> WorkerHome:
    return WorkerHome(new_store(tmp_path / "home"), tmp_path / "home")


class Fetched(ClientFiles):
    """The files of a machine that must fetch all contents.

    Attributes:
        errors: errors of the next fetches.
        fetch_s: duration of a fetch.
    """

    errors: list[Exception]
    fetch_s = 0.0

    async def content(self, id: str) -> Path:
        await asyncio.sleep(self.fetch_s)
        if self.errors:
            raise self.errors.pop(0)
        return await super().content(id)


def fetched(home: WorkerHome, *errors: Exception) -> Fetched:
    (home.folder / "objects").mkdir()
    artifacts = ArtifactSettings(url=(home.folder / "objects").as_uri())
    files = Fetched.of(Settings(home=home.folder, artifacts=artifacts), home.store)
    assert isinstance(files, Fetched)
    files.errors = list(errors)
    home.files = files
    return files


@pytest.mark.parametrize("error", [AWAY, OSError(28, "the disk is full")], ids=["away", "full"])
async def test_job_returns_to_the_queue_until_its_file_can_be_fetched(home: WorkerHome, error: Exception) -> None:
    id = home.add()
    fetched(home, error)
    async with home.working():
        await home.ended(id)
    assert home.job(id).status is JobStatus.SUCCEEDED
    assert home.messages(id)[1] == (WAITS if error is AWAY else "Waiting until the server has enough free disk space")
    assert home.job(id).attempts == 1


async def test_job_fails_if_its_file_was_altered(home: WorkerHome) -> None:
    id = home.add()
    fetched(home, DAMAGED)
    async with home.working():
        await home.ended(id)
    job = home.job(id)
    assert (job.status, DAMAGED.wrong in (job.error or "")) == (JobStatus.FAILED, True)
    assert home.starts(id) == []


async def test_worker_sends_heartbeats_and_can_cancel_a_job_while_its_file_is_fetched(home: WorkerHome) -> None:
    id = home.add()
    fetched(home).fetch_s = 0.5
    async with home.working(home.worker(pace=Pace(poll_s=0.05, report_s=0.05))):
        await home.until(lambda: home.job(id).status is JobStatus.RUNNING)
        seen = home.job(id).seen_at
        await home.until(lambda: home.job(id).seen_at != seen)
        assert home.starts(id) == []
        home.want(id, Wanted.CANCEL)
        await home.ended(id)
    assert home.job(id).status is JobStatus.CANCELLED


async def test_job_completes_once_the_object_store_accepts_its_result(home: WorkerHome) -> None:
    id, errors = home.add(), [AWAY]

    def complete(job: Job, version: VersionId) -> JobResult:
        if errors:
            raise errors.pop()
        return fake_result(job, version)

    async with home.working(home.worker(complete=complete, pace=PACE)):
        await home.ended(id)
    assert home.job(id).status is JobStatus.SUCCEEDED
    assert WAITS in home.messages(id)
