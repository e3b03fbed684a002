"""Workers take fine-tuning jobs from the queue, each once, in an order that is fair to the owners."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy import update
from sqlalchemy.orm import Session

from serving.fine_tuning.queue import (
    ABANDONED_AFTER,
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
    take_job,
)
from serving.fine_tuning.request_rows import JobError, change_wanted
from serving.fine_tuning.rows import EventLevel, Job, Wanted, find_job, read_events
from serving.http.page import Page
from svc.store.leases import database_time
from svc.store.statuses import JobStatus
from svc.store.tables import JobRow
from svc.version import VersionId
from tests.builders.jobs import add_job, messages

NUMBERS = count(1)
BEGUN = datetime.now(UTC) - timedelta(hours=1)
Add = Callable[..., str]


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


@pytest.fixture
def add(store: Store) -> Add:
    def add(owner: str = "alice", **fields: Any) -> str:
        created_at = BEGUN + timedelta(seconds=next(NUMBERS))
        return add_job(store, **{"owner": owner, "created_at": created_at, "events": (), **fields}).id

    return add


def take(store: Store, worker: str = "w1", may_run: Callable[[Job], bool] = lambda job: True) -> str | None:
    job = take_job(store, worker, may_run)
    return None if job is None else job.id


def find(store: Store, id: str) -> Job:
    return find_job(store, id, None)


def silence(store: Store, id: str, time: timedelta = ABANDONED_AFTER + timedelta(seconds=1)) -> None:
    """Make a job's worker silent for a time."""
    with Session(store) as session:
        before = database_time(session) - time
    with store.begin() as connection:
        connection.execute(update(JobRow).where(JobRow.id == id).values(seen_at=before))


def test_older_of_two_jobs_of_one_owner_is_taken_first_and_marked_as_running(store: Store, add: Add) -> None:
    first = add()
    add()
    assert take(store) == first
    job = find(store, first)
    assert (job.status, job.worker, job.attempts) == (JobStatus.RUNNING, "w1", 1)
    assert job.started_at == job.seen_at
    assert messages(store, first) == ["Fine-tuning job started"]


def test_worker_takes_no_job_if_no_queued_job_is_eligible(store: Store, add: Add) -> None:
    assert take(store) is None
    id = add(wanted=Wanted.PAUSE)
    add(status=JobStatus.VALIDATING_FILES)
    assert take(store) is None
    change_wanted(store, id, None, Wanted.RUN)
    assert take(store, may_run=lambda job: job.id != id) is None
    assert take(store) == id


@pytest.mark.slow
def test_owners_take_turns_when_one_has_queued_many_jobs(store: Store, add: Add) -> None:
    alice = [add("alice") for _ in range(4)]
    bob = [add("bob") for _ in range(2)]
    carol = [add("carol")]
    taken = []
    while id := take(store):
        taken.append(id)
        succeed(store, id, "w1", VersionId("bot", 1), JobResult("ft:bot"))
    assert taken == [alice[0], bob[0], carol[0], alice[1], bob[1], alice[2], alice[3]]


@pytest.mark.slow
def test_owner_with_the_fewest_running_jobs_is_next_when_several_workers_run(store: Store, add: Add) -> None:
    alice = [add("alice") for _ in range(3)]
    bob = [add("bob") for _ in range(3)]
    assert [take(store, worker) for worker in ("w1", "w2", "w3")] == [alice[0], bob[0], alice[1]]
    succeed(store, alice[0], "w1", VersionId("bot", 1), JobResult("ft:bot"))
    succeed(store, alice[1], "w3", VersionId("bot", 2), JobResult("ft:bot"))
    assert [take(store, worker) for worker in ("w1", "w3")] == [alice[2], bob[1]]


@pytest.mark.slow
def test_five_concurrent_workers_take_each_of_20_jobs_exactly_once(store: Store, add: Add) -> None:
    ids = [add(f"owner-{number % 3}") for number in range(20)]
    taken = Counter[str]()

    def work(worker: str) -> None:
        while id := take(store, worker):
            taken[id] += 1
            report_job(store, id, worker, news=[JobNews("working")])
            succeed(store, id, worker, VersionId("bot", 1), JobResult("ft:bot"))

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(work, [f"w{number}" for number in range(5)]))
    assert taken == Counter(ids)
    assert {find(store, id).status for id in ids} == {JobStatus.SUCCEEDED}


def test_restarted_worker_resumes_its_own_job_before_taking_new_jobs(store: Store, add: Add) -> None:
    first = add()
    add("bob")
    take(store)
    change_wanted(store, first, None, Wanted.CANCEL)
    job = take_job(store, "w1", lambda job: False)
    assert job is not None
    assert (job.id, job.wanted, job.attempts) == (first, Wanted.CANCEL, 1)
    assert messages(store, first) == ["Fine-tuning job started"]


def test_job_of_an_unresponsive_worker_is_reassigned_and_late_reports_are_rejected(store: Store, add: Add) -> None:
    id = add()
    take(store)
    silence(store, id, timedelta(seconds=30))
    assert take(store, "w2") is None
    silence(store, id)
    assert take(store, "w2") == id
    assert (find(store, id).worker, find(store, id).attempts) == ("w2", 1)
    assert "The job's worker is not responding; the job returns to the queue" in messages(store, id)
    for report in (report_job, read_wanted):
        with pytest.raises(JobLostError):
            report(store, id, "w1")
    with pytest.raises(JobLostError):
        release_job(store, id, "w1", "stopped")
    with pytest.raises(JobLostError):
        succeed(store, id, "w1", VersionId("bot", 1), JobResult("ft:bot"))


@pytest.mark.parametrize(
    ("wanted", "status", "last"),
    [
        (Wanted.CANCEL, JobStatus.CANCELLED, "Fine-tuning job cancelled"),
        (Wanted.PAUSE, JobStatus.QUEUED, "Fine-tuning job paused"),
    ],
)
def test_cancel_or_pause_request_is_applied_to_a_job_with_an_unresponsive_worker(
    store: Store, add: Add, wanted: Wanted, status: JobStatus, last: str
) -> None:
    id = add()
    take(store)
    change_wanted(store, id, None, wanted)
    silence(store, id)
    assert take(store, "w2") is None
    assert (find(store, id).status, find(store, id).worker) == (status, None)
    assert messages(store, id)[-1] == last


def test_reporting_progress_stores_it_and_returns_the_requested_job_state(store: Store, add: Add) -> None:
    id = add()
    take(store)
    silence(store, id)
    news = [JobNews("Step 1/9: training loss=2.00", {"step": 1, "train_loss": 2.0}), JobNews("merging")]
    assert report_job(store, id, "w1", left_s=60, trained_tokens=99, news=news) is Wanted.RUN
    assert take(store, "w2") is None
    job = find(store, id)
    assert job.trained_tokens == 99
    assert job.estimated_finish is not None
    assert timedelta(seconds=50) < job.estimated_finish - datetime.now(UTC) < timedelta(seconds=70)
    assert read_reported(store, id) == Reported(1, 1)
    change_wanted(store, id, None, Wanted.PAUSE)
    assert report_job(store, id, "w1") is read_wanted(store, id, "w1") is Wanted.PAUSE
    assert find(store, id).trained_tokens == 99


def test_new_job_has_no_reported_steps(store: Store, add: Add) -> None:
    assert read_reported(store, add()) == Reported(0, 0)


@pytest.mark.parametrize("died", [False, True])
def test_job_attempt_is_counted_only_if_the_training_process_died(store: Store, add: Add, died: bool) -> None:
    id = add()
    for _ in range(2):
        take(store)
        release_job(store, id, "w1", "stopped", died=died)
    assert find(store, id).attempts == (2 if died else 0)


@pytest.mark.slow
def test_repeated_waiting_event_of_a_job_is_recorded_only_once(store: Store, add: Add) -> None:
    id = add()
    for _ in range(3):
        take(store)
        release_job(store, id, "w1", "Waiting for memory")
    assert messages(store, id) == ["Fine-tuning job started", "Waiting for memory"]


def test_paused_job_waits_in_the_queue_when_its_worker_releases_it(store: Store, add: Add) -> None:
    id = add()
    take(store)
    change_wanted(store, id, None, Wanted.PAUSE)
    release_job(store, id, "w1", "stopped")
    assert (find(store, id).status, find(store, id).worker) == (JobStatus.QUEUED, None)
    assert messages(store, id)[-1] == "Fine-tuning job paused"
    assert take(store) is None
    change_wanted(store, id, None, Wanted.RUN)
    assert take(store) == id


def test_interrupted_job_is_resumed_before_other_jobs_by_the_worker_that_has_its_checkpoint(
    store: Store, add: Add
) -> None:
    id = add("alice")
    take(store)
    other = add("bob")
    release_job(store, id, "w1", "The server stops", resumes_here=True)
    assert [take(store, "w2"), take(store, "w1")] == [other, id]


def test_result_is_recorded_when_a_job_succeeds(store: Store, add: Add) -> None:
    id = add()
    take(store)
    succeed(store, id, "w1", VersionId("ft-alice-small", 3), JobResult("ft:small:org:x:1", "file-9"))
    job = find(store, id)
    assert (job.status, job.version) == (JobStatus.SUCCEEDED, VersionId("ft-alice-small", 3))
    assert (job.fine_tuned_model, job.result_file) == ("ft:small:org:x:1", "file-9")
    assert job.finished_at is not None
    assert messages(store, id)[-3:] == [
        "The model is registered as ft-alice-small@3",
        "New fine-tuned model created: ft:small:org:x:1",
        "The job has successfully completed",
    ]
    assert take(store) is None


def test_error_is_recorded_when_a_job_fails(store: Store, add: Add) -> None:
    id = add()
    take(store)
    fail(store, id, "w1", JobError("training_failed", "the loss is nan"))
    job = find(store, id)
    assert job.status is JobStatus.FAILED
    assert json.loads(job.error or "") == {"code": "training_failed", "message": "the loss is nan", "param": None}
    events, _ = read_events(store, id, page=Page(1))
    assert (events[0].level, events[0].message) == (EventLevel.ERROR, "Fine-tuning job failed: the loss is nan")


def test_cancelled_job_ends_once_its_worker_has_stopped_it(store: Store, add: Add) -> None:
    id = add()
    take(store)
    assert change_wanted(store, id, None, Wanted.CANCEL).status is JobStatus.RUNNING
    end_cancelled(store, id, "w1")
    assert find(store, id).status is JobStatus.CANCELLED
    assert messages(store, id)[-1] == "Fine-tuning job cancelled"
