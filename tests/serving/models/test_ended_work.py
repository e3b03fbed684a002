"""Jobs and batches that ended long ago are deleted, unless something still needs them."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine as Store

from serving.batches.rows import find_batch
from serving.files.rows import Purpose, find_file
from serving.fine_tuning.rows import add_event, find_job, read_events
from serving.http.page import EntryNotFoundError, Page
from serving.models.checkpoint_versions import checkpoint_version
from serving.models.fine_tuned_rows import owners_of
from serving.models.retention import newest_batch_at, newest_job_at, remove_ended_batches, remove_ended_jobs
from svc.store.database import is_sqlite
from svc.store.statuses import BatchStatus, JobStatus
from tests.builders.batches import add_batch, end_batch
from tests.builders.jobs import add_job, end_job
from tests.file_row import add_file_row

NOW = datetime.now(UTC)
OLD, LIMIT = NOW - timedelta(days=100), NOW - timedelta(days=90)


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


def remove_jobs(store: Store, *registered: str) -> int:
    return remove_ended_jobs(store, LIMIT, worker="w1", registered=lambda: registered)


def exists(store: Store, id: str) -> bool:
    try:
        return bool(find_job(store, id, None))
    except EntryNotFoundError:
        return False


@pytest.mark.parametrize("status", [status for status in BatchStatus if status.ended])
def test_batch_that_ended_long_ago_is_deleted_but_its_files_are_kept(store: Store, status: BatchStatus) -> None:
    old, recent, open = add_batch(store), add_batch(store), add_batch(store, created_at=OLD)
    add_file_row(store, "file-out", owner="alice", purpose=Purpose.BATCH_OUTPUT)
    end_batch(store, old, status, OLD)
    end_batch(store, recent, status, NOW)
    assert remove_ended_batches(store, LIMIT) == 1
    with pytest.raises(EntryNotFoundError):
        find_batch(store, old.id, None)
    assert find_batch(store, recent.id, None).status is status
    assert find_batch(store, open.id, None).status is BatchStatus.VALIDATING
    assert find_file(store, "file-out", None) and find_file(store, old.input_file, None)
    assert newest_batch_at(store) == recent.created_at


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.CANCELLED])
def test_job_that_ended_long_ago_is_deleted_with_its_events(store: Store, status: JobStatus) -> None:
    old, recent, open = (
        add_job(store, name="ft-a").id,
        add_job(store, name="ft-b"),
        add_job(store, name="ft-c", created_at=OLD).id,
    )
    add_event(store, old, "text")
    end_job(store, old, status, OLD, worker="w1")
    end_job(store, recent.id, status, NOW)
    assert remove_jobs(store) == 1
    assert [exists(store, id) for id in (old, recent.id, open)] == [False, True, True]
    assert read_events(store, old, page=Page(10)) == ([], False)
    assert newest_job_at(store) == recent.created_at


def test_job_is_kept_while_its_model_or_a_checkpoint_is_registered(store: Store) -> None:
    model, checkpoints = add_job(store, name="ft-alice-a").id, add_job(store, name="ft-alice-b").id
    end_job(store, model, JobStatus.SUCCEEDED, OLD, number=1)
    end_job(store, checkpoints, JobStatus.CANCELLED, OLD)
    checkpoint = checkpoint_version(checkpoints, 5).name
    assert remove_jobs(store, "ft-alice-a", checkpoint, "other") == 0
    assert owners_of(store, "ft-alice-a") == owners_of(store, checkpoint) == {"alice"}
    assert remove_jobs(store, "other") == 2


def test_old_failed_job_is_deleted_if_its_model_name_was_registered_by_a_successful_job(store: Store) -> None:
    failed, succeeded = add_job(store, name="ft-alice-a").id, add_job(store, name="ft-alice-a").id
    end_job(store, failed, JobStatus.FAILED, OLD)
    assert remove_jobs(store, "ft-alice-a") == 0  # it may have registered a version before it failed
    end_job(store, succeeded, JobStatus.SUCCEEDED, OLD, number=1)
    assert remove_jobs(store, "ft-alice-a") == 1
    assert (exists(store, failed), exists(store, succeeded)) == (False, True)


def test_ended_job_is_removed_only_by_the_machine_that_ran_it(store: Store) -> None:
    other = add_job(store, name="ft-a").id
    end_job(store, other, JobStatus.FAILED, OLD, worker="w2")
    assert remove_jobs(store) == remove_ended_jobs(store, LIMIT, worker=None, registered=list) == 0
    assert remove_ended_jobs(store, LIMIT, worker="w2", registered=list) == 1


def test_started_job_without_a_worker_is_kept_if_a_different_machine_may_have_run_it(store: Store) -> None:
    given_back, never_begun = add_job(store, name="ft-a").id, add_job(store, name="ft-b").id
    end_job(store, given_back, JobStatus.CANCELLED, OLD, started_at=OLD)
    end_job(store, never_begun, JobStatus.CANCELLED, OLD)
    remove_jobs(store)
    assert (exists(store, given_back), exists(store, never_begun)) == (not is_sqlite(store), False)
