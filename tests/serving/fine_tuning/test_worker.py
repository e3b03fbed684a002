"""The worker trains queued jobs in processes of their own, which neither crash nor cancelling leaves behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import update

from serving.fine_tuning import job_training
from serving.fine_tuning.job_training import Pace
from serving.fine_tuning.queue import take_job
from serving.fine_tuning.rows import EventType, Job, Wanted, read_events
from serving.fine_tuning.training_process import TrainingProcess
from serving.fine_tuning.worker import read_worker_id
from serving.http.page import Page
from svc.errors import RegistryError, ServerNotRunningError
from svc.store.statuses import JobStatus
from svc.store.tables import JobRow
from svc.store.unavailable import StoreUnavailableError
from tests.new_store import new_store
from tests.serving.fine_tuning.worker_home import PACE, WorkerHome, lives

pytestmark = pytest.mark.slow

LONG: dict[str, Any] = {"steps": 2000, "step_s": 0.02}


@pytest.fixture
def home(tmp_path: Path) -> WorkerHome:
    return WorkerHome(new_store(tmp_path / "home"), tmp_path / "home")


@pytest.fixture
def any_home(any_store: Store, tmp_path: Path) -> WorkerHome:
    return WorkerHome(any_store, tmp_path / "home")


async def test_job_runs_and_its_result_is_recorded(any_home: WorkerHome) -> None:
    home, id = any_home, any_home.add()
    async with home.working():
        await home.ended(id)
    job = home.job(id)
    assert (job.status, job.error) == (JobStatus.SUCCEEDED, None)
    assert (str(job.version), job.fine_tuned_model) == (f"{job.name}@1", f"ft:small:org::{id}")
    assert (job.result_file, job.trained_tokens, job.attempts) == ("file-result", 30, 1)
    messages = home.messages(id)
    assert messages[0] == "Fine-tuning job started"
    assert "Stage begun: train" in messages
    assert messages[-2:] == [
        f"New fine-tuned model created: ft:small:org::{id}",
        "The job has successfully completed",
    ]
    events, _ = read_events(home.store, id, page=Page(100, newest_first=False))
    metrics = [json.loads(event.data or "") for event in events if event.type is EventType.METRICS]
    assert metrics[-1]["step"] == metrics[-1]["total_steps"] == 3
    assert any(each.get("valid_loss") == 0.5 and each["valid_mean_token_accuracy"] == 0.75 for each in metrics)
    assert any(event.message.startswith("Step 3/3: ") for event in events)
    await home.until(lambda: not (home.job_folder(id) / "epochs").exists())


async def test_recipe_written_by_a_different_machine_is_adapted_to_the_local_file_path(home: WorkerHome) -> None:
    id = home.add()
    async with home.working():
        await home.ended(id)
    assert str(home.folder / "files" / home.file) in (home.job_folder(id) / "recipe.yaml").read_text()


async def test_job_starts_on_a_creation_notification_without_polling_the_queue(
    home: WorkerHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def take(*arguments: Any) -> Job | None:
        reads.append(arguments)
        return take_job(*arguments)

    monkeypatch.setattr("serving.fine_tuning.worker.take_job", take)
    monkeypatch.setattr("serving.store_changes.changes.FALLBACK_POLL_S", 1000.0)
    home.changes.trust(1000.0)
    async with home.working():
        await home.until(lambda: bool(reads))
        await asyncio.sleep(0.2)
        assert len(reads) == 1
        id = home.add()
        home.changes.announce()
        await home.ended(id)


async def test_job_waits_in_the_queue_when_its_file_is_not_on_this_machine(home: WorkerHome) -> None:
    away, here = home.add(file="file-elsewhere"), home.add()
    async with home.working():
        await home.ended(here)
    assert home.job(away).status is JobStatus.QUEUED


async def test_all_processes_of_a_cancelled_job_end_within_5_seconds(home: WorkerHome) -> None:
    id = home.add(grandchild=True, deaf=True, **LONG)
    pace = Pace(event_s=PACE.event_s)
    async with home.working(home.worker(pace=pace)):
        await home.until(lambda: home.step(id) > 2)
        pids = [*home.starts(id), int((home.job_folder(id) / "grandchild").read_text())]
        assert all(lives(pid) for pid in pids)
        home.want(id, Wanted.CANCEL)
        began = time.monotonic()
        await home.until(lambda: home.job(id).status.ended)
        assert time.monotonic() - began < 5
        assert not any(lives(pid) for pid in pids)
    assert home.job(id).status is JobStatus.CANCELLED
    assert home.messages(id)[-1] == "Fine-tuning job cancelled"
    await home.until(lambda: not (home.job_folder(id) / "epochs").exists())


async def test_paused_job_frees_the_machine_and_resumes_from_its_checkpoint(home: WorkerHome) -> None:
    id = home.add(steps=100, step_s=0.02)
    async with home.working():
        await home.until(lambda: home.step(id) > 2)
        home.want(id, Wanted.PAUSE)
        await home.until(lambda: home.job(id).status is JobStatus.QUEUED)
        other = home.add("bob")
        await home.ended(other)
        step = home.step(id)
        assert step < 100
        assert (home.job_folder(id) / "epochs").is_dir()
        assert not lives(home.starts(id)[0])
        assert home.messages(id)[-1] == "Fine-tuning job paused"
        home.want(id, Wanted.RUN)
        await home.ended(id)
    assert home.job(id).status is JobStatus.SUCCEEDED
    assert len(home.starts(id)) == 2
    lines = (home.job_folder(id) / "progress").read_text().splitlines()
    steps = [record["step"] for record in map(json.loads, lines) if record["kind"] == "step"]
    assert steps == list(range(1, 101))


async def test_pausing_a_job_kills_its_training_if_no_checkpoint_is_written_in_time(home: WorkerHome) -> None:
    id = home.add(deaf=True, **LONG)
    async with home.working():
        await home.until(lambda: home.step(id) > 2)
        home.want(id, Wanted.PAUSE)
        await home.until(lambda: home.job(id).status is JobStatus.QUEUED)
    assert not lives(home.starts(id)[0])
    assert home.messages(id)[-1] == "Fine-tuning job paused"


async def test_training_killed_by_a_signal_continues_from_its_checkpoint(home: WorkerHome) -> None:
    id = home.add(steps=6, at=3)
    async with home.working():
        await home.ended(id)
    assert home.job(id).status is JobStatus.SUCCEEDED
    assert len(home.starts(id)) == 2
    assert "The training process died; the training continues from its last checkpoint" in home.messages(id)


async def test_child_processes_are_killed_when_their_training_process_has_died(home: WorkerHome) -> None:
    id = home.add(grandchild=True, steps=2000, step_s=0.02)
    async with home.working():
        await home.until(lambda: home.step(id) > 20)
        grandchild = int((home.job_folder(id) / "grandchild").read_text())
        os.kill(home.starts(id)[0], signal.SIGKILL)
        await home.until(lambda: not lives(grandchild))
        home.want(id, Wanted.CANCEL)
        await home.ended(id)


async def test_job_fails_when_a_child_process_of_its_training_is_killed_three_times(home: WorkerHome) -> None:
    id = home.add(exit=12, text="error: the child process merge exited with code -9\n  do: free some memory")
    async with home.working():
        await home.ended(id)
    assert (home.job(id).status, len(home.starts(id))) == (JobStatus.FAILED, 3)
    assert json.loads(home.job(id).error or "")["message"] == "the child process merge exited with code -9"


async def test_job_fails_when_its_training_is_killed_three_times(home: WorkerHome) -> None:
    id = home.add(exit=1)
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    async with home.working(home.worker(command=lambda recipe, progress: command)):
        await home.ended(id)
    job = home.job(id)
    assert (job.status, job.attempts) == (JobStatus.FAILED, 3)
    assert json.loads(job.error or "")["message"].startswith("the training was killed 3 times")


@pytest.mark.parametrize(
    ("exit", "text", "error"),
    [
        (
            12,
            "error: stage train failed in torch: RuntimeError: bad tensor\n  do: read /root/home/runs/x/error.log",
            {"code": "training_failed", "message": "stage train failed in torch: RuntimeError: bad tensor"},
        ),
        (
            3,
            "warm up\nerror: /root/home/files/file-9:4: no answer\n  expected: an answer\n  do: fix it",
            {"code": "invalid_training_file", "message": "file-9:4: no answer; expected an answer"},
        ),
        (
            1,
            'Traceback (most recent call last):\n  File "/x/y.py", line 1\nValueError: no',
            {
                "code": "server_error",
                "message": "the training failed because of a server error; see the server's log",
            },
        ),
    ],
)
async def test_failed_job_reports_its_training_error(
    home: WorkerHome, exit: int, text: str, error: dict[str, str]
) -> None:
    id = home.add(exit=exit, text=text)
    async with home.working():
        await home.ended(id)
    assert home.job(id).status is JobStatus.FAILED
    given = json.loads(home.job(id).error or "")
    assert {key: given[key] for key in error} == error
    await home.until(lambda: not (home.job_folder(id) / "epochs").exists())
    assert len(home.starts(id)) == 1


async def test_job_waiting_for_memory_does_not_block_other_jobs(home: WorkerHome) -> None:
    big = home.add(exit=20, text="error: training needs 90 GB")
    others = [home.add() for _ in range(2)]
    async with home.working():
        await home.until(lambda: len(home.starts(big)) >= 2)
        await home.ended(*others)
        home.want(big, Wanted.CANCEL)
        await home.ended(big)
    assert home.messages(big).count("Waiting until the server has enough free memory") == 1


async def test_job_waits_while_the_ray_cluster_is_unreachable(home: WorkerHome) -> None:
    id = home.add(exit=ServerNotRunningError.exit_code, text="error: no Ray cluster answers at head:6379")
    async with home.working():
        await home.until(lambda: len(home.starts(id)) >= 2)
        home.want(id, Wanted.CANCEL)
        await home.ended(id)
    assert home.messages(id).count("Waiting until the Ray cluster can be reached") == 1


async def test_job_returns_to_the_queue_with_a_checkpoint_when_the_server_stops(home: WorkerHome) -> None:
    id = home.add(**LONG)
    other = home.add()
    async with home.working():
        await home.until(lambda: home.step(id) > 2)
    assert not lives(home.starts(id)[0])
    job = home.job(id)
    assert (job.status, job.attempts) == (JobStatus.QUEUED, 0)
    assert home.messages(id)[-1] == "The server is stopping; the training continues when the server runs again"
    async with home.working():
        await home.until(lambda: len(home.starts(id)) == 2)
        assert home.job(other).status is JobStatus.QUEUED
        home.want(id, Wanted.CANCEL)
        await home.ended(id, other)


async def test_stopping_the_server_while_a_training_process_starts_leaves_no_process_running(
    home: WorkerHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = home.add(**LONG)
    start, entered, stopping = TrainingProcess.start, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> TrainingProcess:
        entered.set()
        stopping.wait()
        return start(*arguments)

    monkeypatch.setattr(TrainingProcess, "start", slow)
    async with home.working():
        await home.until(entered.is_set)
        asyncio.get_running_loop().call_later(0.1, stopping.set)
    assert home.job(id).status is JobStatus.QUEUED
    assert not any(lives(pid) for pid in home.starts(id))


async def test_training_process_is_killed_when_another_worker_claims_its_job(home: WorkerHome) -> None:
    id = home.add(grandchild=True, **LONG)
    async with home.working():
        await home.until(lambda: home.step(id) > 2)
        with home.store.begin() as connection:
            connection.execute(update(JobRow).where(JobRow.id == id).values(worker="another"))
        await home.until(lambda: not lives(home.starts(id)[0]))
        await home.until(lambda: not lives(int((home.job_folder(id) / "grandchild").read_text())))
    assert home.job(id).status is JobStatus.RUNNING


async def test_training_continues_while_the_store_does_not_respond(
    home: WorkerHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = home.add(steps=40, step_s=0.02)
    failures = 0

    def away(*arguments: object, **values: object) -> None:
        nonlocal failures
        failures += 1
        raise StoreUnavailableError(RegistryError("away"))

    async with home.working():
        await home.until(lambda: home.step(id) > 2)
        with monkeypatch.context() as patch:
            patch.setattr(job_training, "report_job", away)
            patch.setattr(job_training, "read_wanted", away)
            await home.until(lambda: failures > 3)
        await home.ended(id)
    assert home.job(id).status is JobStatus.SUCCEEDED
    assert len(home.starts(id)) == 1


async def test_job_fails_but_the_worker_keeps_running_if_creating_the_result_raises_an_error(home: WorkerHome) -> None:
    ids = [home.add(), home.add()]

    def broken(*arguments: object) -> None:
        raise KeyError("defect")

    async with home.working(home.worker(complete=broken)):
        await home.ended(*ids)
    assert {home.job(id).status for id in ids} == {JobStatus.FAILED}
    assert "defect" not in (home.job(ids[0]).error or "")


def test_worker_id_is_the_same_after_a_restart_but_different_for_each_home_folder(tmp_path: Path) -> None:
    assert read_worker_id(tmp_path / "a") == read_worker_id(tmp_path / "a") != read_worker_id(tmp_path / "b")


@contextmanager
def server(home: WorkerHome) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker in another process, which is killed at the end."""
    command = [sys.executable, "-m", "tests.serving.fine_tuning.worker_home", str(home.folder)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_training_process_of_a_killed_server_keeps_running_and_is_adopted_by_the_next_server(
    home: WorkerHome,
) -> None:
    id = home.add(steps=200, step_s=0.05, grandchild=True)
    with server(home):
        await home.until(lambda: home.step(id) > 2)
    (pid,) = home.starts(id)
    assert lives(pid)
    async with home.working():
        step = home.step(id)
        await home.until(lambda: home.step(id) > step + 10)
        assert (home.job(id).status, home.starts(id), lives(pid)) == (JobStatus.RUNNING, [pid], True)
        home.want(id, Wanted.CANCEL)
        await home.ended(id)
        assert not lives(pid)
        assert not lives(int((home.job_folder(id) / "grandchild").read_text()))


async def test_training_continues_when_a_new_server_replaces_the_running_server(home: WorkerHome) -> None:
    id = home.add(steps=100, step_s=0.05)
    with server(home) as process:
        await home.until(lambda: home.step(id) > 2)
        process.send_signal(signal.SIGUSR1)
        assert await asyncio.to_thread(process.wait, 30) == 0
    assert home.job(id).status is JobStatus.RUNNING
    assert lives(home.starts(id)[0])
    async with home.working():
        await home.ended(id)
    assert (home.job(id).status, len(home.starts(id))) == (JobStatus.SUCCEEDED, 1)


async def test_training_continues_when_a_new_server_starts_during_a_store_outage(
    home: WorkerHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = home.add(**LONG)
    with server(home):
        await home.until(lambda: home.step(id) > 2)
    (pid,) = home.starts(id)

    def away(*arguments: object) -> None:
        raise StoreUnavailableError(RegistryError("away"))

    monkeypatch.setattr("serving.fine_tuning.worker.find_job", away)
    async with home.working():
        step = home.step(id)
        await home.until(lambda: home.step(id) > step + 10)
        assert (home.starts(id), lives(pid)) == ([pid], True)


async def test_job_succeeds_when_its_training_finished_while_no_server_was_running(home: WorkerHome) -> None:
    id = home.add(steps=20, step_s=0.05)
    with server(home):
        await home.until(lambda: home.step(id) > 2)
    await home.until(lambda: not lives(home.starts(id)[0]))
    async with home.working():
        await home.ended(id)
    assert home.job(id).status is JobStatus.SUCCEEDED


async def test_each_of_20_jobs_succeeds_exactly_once_when_the_server_is_killed_repeatedly(home: WorkerHome) -> None:
    ids = [home.add(f"owner-{number % 3}", steps=5, step_s=0.02) for number in range(20)]
    for ended in (4, 9, 14):
        with server(home):
            await home.until(lambda limit=ended: sum(home.job(id).status.ended for id in ids) >= limit)  # type: ignore[misc]
    async with home.working():
        await home.ended(*ids)
    assert {home.job(id).status for id in ids} == {JobStatus.SUCCEEDED}
    for id in ids:
        assert home.messages(id).count("The job has successfully completed") == 1
        assert not any(lives(pid) for pid in home.starts(id))


async def test_orphaned_training_process_of_a_finished_job_is_killed_when_the_server_starts(home: WorkerHome) -> None:
    id = home.add(**LONG)
    with server(home):
        await home.until(lambda: home.step(id) > 2)
    with home.store.begin() as connection:
        connection.execute(update(JobRow).where(JobRow.id == id).values(status="cancelled"))
    async with home.working():
        await home.until(lambda: not lives(home.starts(id)[0]))
