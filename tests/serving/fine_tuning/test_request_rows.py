"""Tests what owners ask of their fine-tuning jobs: creation, cancelling, pausing and resuming."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine as Store

from serving.fine_tuning.request_rows import (
    JobEndedError,
    JobError,
    TooManyJobsError,
    change_wanted,
    fail_checked,
    find_jobs,
    find_repeated,
    find_trained,
    queue_checked,
    read_checking,
)
from serving.fine_tuning.rows import Wanted, find_job
from serving.http.page import REPEAT_WINDOW, EntryNotFoundError, Page
from serving.models.fine_tuned_rows import owners_of
from svc.store import audit
from svc.store.audit import Action, AuditEntry
from svc.store.statuses import JobStatus
from svc.version import VersionId
from tests.builders.actors import ALICE_KEY
from tests.builders.jobs import add_job, change_job, messages
from tests.file_row import add_file_row


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


def test_created_job_is_stored_with_its_first_events_and_an_audit_event(store: Store) -> None:
    created = add_job(store)
    assert find_job(store, created.id, "alice") == created
    assert messages(store, created.id) == ["created", "queued"]
    (event,) = audit.read_events(store, newest=10)
    assert (event.action, event.subject, event.actor) == ("job.create", created.id, "key:alice")


def test_repeated_create_request_returns_the_existing_job_while_it_is_unfinished(store: Store) -> None:
    first = add_job(store, fingerprint="same")
    assert add_job(store, fingerprint="same", max_jobs=1) == first
    assert messages(store, first.id) == ["created", "queued"]
    assert len(audit.read_events(store, newest=10)) == 1


def test_repeated_create_request_creates_a_new_job_if_the_previous_job_has_ended(store: Store) -> None:
    first = add_job(store, fingerprint="same")
    change_job(store, first.id, status="failed")
    assert add_job(store, fingerprint="same").id != first.id


def test_repeated_create_request_creates_a_new_job_if_the_previous_job_is_too_old(store: Store) -> None:
    first = add_job(store, fingerprint="same", created_at=datetime.now(UTC) - REPEAT_WINDOW - timedelta(seconds=1))
    assert add_job(store, fingerprint="same").id != first.id


def test_repeated_create_request_creates_a_new_job_if_the_previous_job_is_being_cancelled(store: Store) -> None:
    first = add_job(store, fingerprint="same")
    change_job(store, first.id, status="running", wanted="cancel")
    assert add_job(store, fingerprint="same").id != first.id


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_job_is_refused_when_its_file_has_been_deleted(store: Store, param: str) -> None:
    missing: dict[str, Any] = {param: "file-gone"}
    with pytest.raises(EntryNotFoundError, match="file-gone") as caught:
        add_job(store, **missing)
    assert caught.value.param == param
    assert (read_checking(store), audit.read_events(store, newest=10)) == ([], [])


@pytest.mark.slow
def test_twenty_concurrent_identical_requests_create_one_job(store: Store) -> None:
    with ThreadPoolExecutor(20) as threads:
        created = list(threads.map(lambda _: add_job(store, fingerprint="same"), range(20)))
    assert len({each.id for each in created}) == 1


def test_job_is_refused_when_the_owner_has_too_many_open_jobs(store: Store) -> None:
    first = add_job(store, max_jobs=2)
    add_job(store, max_jobs=2)
    with pytest.raises(TooManyJobsError, match="this key has 2 unfinished jobs"):
        add_job(store, max_jobs=2)
    with pytest.raises(TooManyJobsError):
        find_repeated(store, "other", "alice", max_jobs=2)
    add_job(store, owner="bob", max_jobs=2)
    change_job(store, first.id, status="succeeded")
    add_job(store, max_jobs=2)


def test_estimated_finish_time_of_a_job_accounts_for_jobs_queued_before_it(store: Store) -> None:
    first, second = add_job(store, training_s=100.0), add_job(store, training_s=50.0)
    assert first.estimated_finish is not None
    assert second.estimated_finish == first.estimated_finish + timedelta(seconds=50)
    assert add_job(store).estimated_finish is None


def test_queued_job_ends_immediately_when_it_is_cancelled(store: Store) -> None:
    created = add_job(store, training_s=10.0)
    entry = AuditEntry(Action.CANCEL_JOB, created.id, ALICE_KEY)
    cancelled = change_wanted(store, created.id, "alice", Wanted.CANCEL, entry)
    assert cancelled.status is JobStatus.CANCELLED
    assert cancelled.finished_at is not None
    assert cancelled.estimated_finish is None
    assert messages(store, created.id)[-1] == "Fine-tuning job cancelled"
    assert change_wanted(store, created.id, "alice", Wanted.CANCEL, entry) == cancelled  # a retry of the client
    assert [event.action for event in audit.read_events(store, newest=10)] == ["job.create", "job.cancel"]


def test_cancelled_job_keeps_running_until_its_worker_stops_it(store: Store) -> None:
    created = add_job(store)
    change_job(store, created.id, status="running", worker="worker-1")
    cancelled = change_wanted(store, created.id, "alice", Wanted.CANCEL)
    assert (cancelled.status, cancelled.wanted) == (JobStatus.RUNNING, Wanted.CANCEL)
    with pytest.raises(JobEndedError, match="is being cancelled"):
        change_wanted(store, created.id, "alice", Wanted.PAUSE)


def test_paused_job_stays_queued_until_it_is_resumed(store: Store) -> None:
    created = add_job(store, training_s=10.0)
    for _ in range(2):
        paused = change_wanted(store, created.id, None, Wanted.PAUSE)
    assert (paused.status, paused.wanted, paused.estimated_finish) == (JobStatus.QUEUED, Wanted.PAUSE, None)
    resumed = change_wanted(store, created.id, None, Wanted.RUN)
    assert (resumed.status, resumed.wanted) == (JobStatus.QUEUED, Wanted.RUN)
    expected = ["created", "queued", "Fine-tuning job paused", "Resuming the fine-tuning job was requested"]
    assert messages(store, created.id) == expected


@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        ("succeeded", Wanted.CANCEL),
        ("failed", Wanted.CANCEL),
        ("succeeded", Wanted.PAUSE),
        ("failed", Wanted.RUN),
        ("cancelled", Wanted.PAUSE),
        ("cancelled", Wanted.RUN),
    ],
)
def test_ended_job_cannot_be_cancelled_paused_or_resumed(store: Store, status: str, wanted: Wanted) -> None:
    created = add_job(store)
    change_job(store, created.id, status=status)
    with pytest.raises(JobEndedError, match=f"has already ended: {status}"):
        change_wanted(store, created.id, "alice", wanted)


def test_job_of_a_different_owner_is_neither_found_nor_changed(store: Store) -> None:
    created = add_job(store)
    for id in (created.id, "ftjob-none", "a\0"):
        with pytest.raises(EntryNotFoundError):
            change_wanted(store, id, "bob", Wanted.CANCEL)
    assert find_job(store, created.id, None).wanted is Wanted.RUN


def test_validated_job_is_queued_unless_it_has_been_cancelled(store: Store) -> None:
    created = add_job(store, status=JobStatus.VALIDATING_FILES)
    assert [each.id for each in read_checking(store)] == [created.id]
    values = {"request": '{"a": 1}', "recipe": "name: b\n", "training_s": 5.0, "event": "validated"}
    queue_checked(store, created.id, **values)  # type: ignore[arg-type]
    queued = find_job(store, created.id, None)
    assert (queued.status, queued.request, queued.recipe) == (JobStatus.QUEUED, '{"a": 1}', "name: b\n")
    assert queued.estimated_finish is not None
    cancelled = add_job(store, status=JobStatus.VALIDATING_FILES)
    change_wanted(store, cancelled.id, None, Wanted.CANCEL)
    queue_checked(store, cancelled.id, **values)  # type: ignore[arg-type]
    fail_checked(store, cancelled.id, JobError("a", "b"))
    assert find_job(store, cancelled.id, None).status is JobStatus.CANCELLED
    assert read_checking(store) == []


def test_failed_validation_ends_the_job_with_the_error(store: Store) -> None:
    created = add_job(store, status=JobStatus.VALIDATING_FILES)
    fail_checked(store, created.id, JobError("invalid_training_file", "line 1 is not JSON", "training_file"))
    failed = find_job(store, created.id, None)
    assert failed.status is JobStatus.FAILED
    assert failed.error is not None
    assert json.loads(failed.error) == {
        "code": "invalid_training_file",
        "message": "line 1 is not JSON",
        "param": "training_file",
    }
    assert messages(store, created.id)[-1] == "Fine-tuning job failed: line 1 is not JSON"


@pytest.mark.slow
def test_jobs_are_found_by_their_metadata_across_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.fine_tuning.request_rows._CHUNK", 2)
    given: list[Mapping[str, str] | None] = [{"team": "a", "n": "1"}, {"team": "b"}, None, {"team": "a"}, {"team": "a"}]
    ids = [add_job(store, request=json.dumps({"metadata": each} if each else {})).id for each in given]
    add_job(store, owner="bob", request=json.dumps({"metadata": {"team": "a"}}))

    def found(page: Page, metadata: Mapping[str, str] | None) -> tuple[list[int], bool]:
        jobs, more = find_jobs(store, "alice", page=page, metadata=metadata)
        return [ids.index(each.id) for each in jobs], more

    assert found(Page(2), {"team": "a"}) == ([4, 3], True)
    assert found(Page(2, ids[3]), {"team": "a"}) == ([0], False)
    assert found(Page(10), {"team": "a", "n": "1"}) == ([0], False)
    assert found(Page(10), None) == ([2], False)
    assert found(Page(10), {"team": ""}) == ([], False)


def test_fine_tuned_model_is_found_by_its_owner_when_the_job_has_succeeded(store: Store) -> None:
    created = add_job(store, fine_tuned_model="ft:small:org:x:1", number=3)
    assert find_trained(store, "ft:small:org:x:1", "alice") is None
    change_job(store, created.id, status="succeeded")
    assert find_trained(store, "ft:small:org:x:1", "alice") == VersionId("ft-alice-small", 3)
    assert find_trained(store, "ft:small:org:x:1", None) == VersionId("ft-alice-small", 3)
    assert find_trained(store, "ft:small:org:x:1", "bob") is None
    assert owners_of(store, "ft-alice-small") == {"alice"}
    assert owners_of(store, "tickets") == frozenset()


def test_stored_job_round_trips_unchanged(store: Store) -> None:
    add_file_row(store, "file-2")
    created = add_job(store, validation_file="file-2", trained_tokens=2**40)
    assert find_job(store, created.id, None) == replace(created)
