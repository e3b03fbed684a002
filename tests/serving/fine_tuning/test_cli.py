"""`svc jobs` lists, follows and changes fine-tuning jobs, on this machine and through a server."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine as Store

from serving.fine_tuning import cli as jobs_cli
from serving.fine_tuning.jobs_client import LocalJobs, RemoteJobs
from serving.fine_tuning.queue import JobNews, JobResult, fail, report_job, succeed, take_job
from serving.fine_tuning.request_rows import JobError
from serving.fine_tuning.rows import Wanted
from serving.http.connections import watched
from svc.cli import group
from svc.errors import NotFoundError, RefusedError, ServerNotRunningError, TrainingError
from svc.remote.server_url import ServerAddress
from svc.store.audit import read_events
from svc.store.statuses import JobStatus
from svc.version import VersionId
from tests.new_store import new_store
from tests.serving.fine_tuning.fine_tuning_service import FineTuningService
from tests.serving.fine_tuning.worker_home import WorkerHome
from tests.serving.service import ClientsProtocol
from tests.serving.socket_server import running

STEP = JobNews("Step 3/9: training loss=1.25", {"step": 3, "total_steps": 9, "train_loss": 1.25})
Svc = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path) -> WorkerHome:
    return WorkerHome(new_store(tmp_path / "home"), tmp_path / "home")


@pytest.fixture
def svc(home: WorkerHome) -> Svc:
    def svc(*arguments: str) -> Result:
        return CliRunner().invoke(group, ["--home", str(home.folder), "jobs", *arguments])

    return svc


def take(home: WorkerHome) -> None:
    assert take_job(home.store, "w1", lambda job: True) is not None


def end(home: WorkerHome, id: str) -> None:
    succeed(home.store, id, "w1", VersionId("bot", 1), JobResult(f"ft:small:org::{id}"))


@pytest.mark.slow
def test_jobs_are_listed_newest_first(home: WorkerHome, svc: Svc) -> None:
    assert "no fine-tuning jobs yet" in svc("list").output
    first, second = home.add(), home.add()
    take(home)
    output = svc("list").output
    assert output.index(second) < output.index(first)
    assert "running" in output
    assert [row["id"] for row in json.loads(svc("list", "--json", "--limit", "1").output)] == [second]


@pytest.mark.slow
def test_job_with_no_training_time_left_shows_its_stage_instead_of_the_remaining_time(
    home: WorkerHome, svc: Svc
) -> None:
    id = home.add()
    take(home)
    report_job(home.store, id, "w1", left_s=90.0, news=[JobNews("Stage begun: train"), STEP])
    assert "in 1 min" in svc("list").output
    report_job(home.store, id, "w1", left_s=0.0, news=[JobNews("Stage begun: evaluate")])
    for output in (svc("list").output, svc("show", id).output.partition("\n\n")[0]):
        assert "stage: evaluate" in output
        assert "in 0 s" not in output


def test_show_command_prints_the_events_of_a_job_and_replaces_control_characters(home: WorkerHome, svc: Svc) -> None:
    id = home.add()
    take(home)
    report_job(home.store, id, "w1", news=[STEP])
    fail(home.store, id, "w1", JobError("training_failed", "bad \x1b[31mtext"))
    output = svc("show", id).output
    assert "Step 3/9: training loss=1.25" in output
    assert "bad ?[31mtext" in output
    shown = json.loads(svc("show", id, "--json").output)
    assert (shown["status"], len(shown["events"])) == ("failed", 3)


@pytest.mark.slow
def test_job_is_followed_until_it_succeeds(home: WorkerHome, svc: Svc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_cli, "_POLL_S", 0.05)
    id = home.add()

    def train() -> None:
        take(home)
        time.sleep(0.3)
        report_job(home.store, id, "w1", news=[STEP])
        time.sleep(0.3)
        end(home, id)

    thread = threading.Thread(target=train)
    thread.start()
    result = svc("follow", id)
    thread.join()
    assert result.exit_code == 0, result.output
    lines = [line[18:] for line in result.stdout.splitlines()]
    assert lines[:5] == [
        "Fine-tuning job started",
        "Step 3/9: training loss=1.25",
        "The model is registered as bot@1",
        f"New fine-tuned model created: ft:small:org::{id}",
        "The job has successfully completed",
    ]
    assert f"fine-tuned model: ft:small:org::{id}" in result.stdout


def test_following_a_job_with_the_json_option_prints_one_object_per_line(home: WorkerHome, svc: Svc) -> None:
    id = home.add()
    take(home)
    report_job(home.store, id, "w1", news=[STEP])
    end(home, id)
    objects = [json.loads(line) for line in svc("follow", id, "--json").stdout.splitlines()]
    assert [each["object"] for each in objects] == ["fine_tuning.job.event"] * 5 + ["fine_tuning.job"]
    assert objects[1]["data"]["train_loss"] == 1.25


@pytest.mark.slow
def test_following_a_job_that_fails_or_is_cancelled_exits_with_an_error(home: WorkerHome, svc: Svc) -> None:
    failed = home.add()
    take(home)
    fail(home.store, failed, "w1", JobError("training_failed", "the loss is nan"))
    result = svc("follow", failed)
    assert isinstance(result.exception, TrainingError)
    assert str(result.exception) == f"job {failed} failed: the loss is nan"
    cancelled = home.add()
    home.want(cancelled, Wanted.CANCEL)
    assert isinstance(svc("follow", cancelled).exception, RefusedError)


def test_job_is_followed_even_if_the_server_restarts(
    home: WorkerHome, svc: Svc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_cli, "_POLL_S", 0.01)
    id = home.add()
    take(home)
    end(home, id)
    find, calls = LocalJobs.find, 0

    def away(self: LocalJobs, id: str) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if 1 < calls < 4:
            raise ServerNotRunningError("away")
        return find(self, id)

    monkeypatch.setattr(LocalJobs, "find", away)
    assert svc("follow", id).exit_code == 0
    monkeypatch.setattr(jobs_cli, "_RESTART_S", 0.0)
    calls = 0
    assert isinstance(svc("follow", id).exception, ServerNotRunningError)


@pytest.mark.slow
def test_job_can_be_paused_and_resumed_and_then_cancelled(home: WorkerHome, svc: Svc) -> None:
    id = home.add()
    assert svc("pause", id).output == f"{id} is paused\n"
    assert home.job(id).wanted is Wanted.PAUSE
    assert svc("resume", id).output == f"{id} is queued\n"
    assert home.job(id).wanted is Wanted.RUN
    take(home)
    assert "is being paused" in svc("pause", id).output
    assert svc("cancel", id, "--yes").output == f"{id} is being cancelled\n"
    assert home.job(id).wanted is Wanted.CANCEL
    actions = [event.action for event in read_events(home.store, newest=10)]
    assert actions.count("job.cancel") == 1


def test_job_is_not_cancelled_without_confirmation(home: WorkerHome, svc: Svc) -> None:
    id = home.add()
    assert svc("cancel", id).exit_code == 1
    assert svc("cancel", id, "--json").exit_code == 2
    assert home.job(id).status is JobStatus.QUEUED
    assert json.loads(svc("cancel", id, "--json", "--yes").output)["status"] == "cancelled"


@pytest.mark.parametrize("command", ["show", "follow", "pause", "resume"])
def test_jobs_commands_fail_for_an_unknown_job(svc: Svc, command: str) -> None:
    assert isinstance(svc(command, "ftjob-none/../x").exception, NotFoundError)


@pytest.fixture
async def remote(store: Store, socket_folder: Path, tmp_path: Path) -> AsyncIterator[tuple[RemoteJobs, WorkerHome]]:
    """Yield the jobs of a server through its API, and the home of the server."""
    service = FineTuningService(socket_folder, store=store, base=tmp_path)
    socket = socket_folder / "clients.sock"
    async with running(watched(service.app), socket, ClientsProtocol):
        yield RemoteJobs(ServerAddress("http://localhost", socket)), WorkerHome(store, socket_folder)


@pytest.mark.slow
async def test_same_jobs_are_read_from_the_server_and_from_the_store(remote: tuple[RemoteJobs, WorkerHome]) -> None:
    source, home = remote
    local = LocalJobs(home.store, "tuneserve")
    id = home.add()
    take(home)
    report_job(home.store, id, "w1", news=[STEP] * 150)
    assert await asyncio.to_thread(source.recent, 5) == local.recent(5)
    assert await asyncio.to_thread(source.find, id) == local.find(id)
    events = await asyncio.to_thread(lambda: list(source.events(id, None)))
    assert events == list(local.events(id, None))
    assert len(events) == 151
    after = events[148]["id"]
    assert await asyncio.to_thread(lambda: list(source.events(id, after))) == list(local.events(id, after))


@pytest.mark.slow
async def test_changing_a_remote_job_raises_the_same_errors_as_changing_a_local_job(
    remote: tuple[RemoteJobs, WorkerHome],
) -> None:
    source, home = remote
    id = home.add()
    assert (await asyncio.to_thread(source.change, id, Wanted.PAUSE))["status"] == "queued"
    assert home.job(id).wanted is Wanted.PAUSE
    await asyncio.to_thread(source.change, id, Wanted.RUN)
    assert (await asyncio.to_thread(source.change, id, Wanted.CANCEL))["status"] == "cancelled"
    with pytest.raises(RefusedError, match="has already ended: cancelled"):
        await asyncio.to_thread(source.change, id, Wanted.PAUSE)
    with pytest.raises(NotFoundError):
        await asyncio.to_thread(source.find, "ftjob-none/../x")
