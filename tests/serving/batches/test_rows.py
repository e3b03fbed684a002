"""Tests the rows of batches."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine as Store

from serving.batches.rows import (
    Batch,
    BatchEndedError,
    BatchError,
    BatchProgress,
    BatchResult,
    TooManyBatchesError,
    begin_batch,
    cancel_batch,
    end_batch,
    find_batch,
    read_batches,
    read_open_batches,
    record_batch_progress,
)
from serving.http.page import REPEAT_WINDOW, EntryNotFoundError, Page
from svc.store import audit
from svc.store.audit import Action, AuditEntry
from svc.store.leases import Lease, LeaseLostError
from svc.store.statuses import BatchStatus
from tests.builders.actors import ALICE_KEY
from tests.builders.batches import add_batch

PROGRESS = BatchProgress(completed=2, failed=1, tokens_in=30, tokens_out=20)


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


def cancel(store: Store, id: str, owner: str | None = "alice") -> Batch:
    return cancel_batch(store, id, owner, AuditEntry(Action.CANCEL_BATCH, id, ALICE_KEY))


def test_batch_can_be_found_only_by_its_owner_and_by_admins(store: Store) -> None:
    batch = add_batch(store, labels='{"team": "a"}', output_expires_s=3600)
    assert find_batch(store, batch.id, "alice") == find_batch(store, batch.id, None) == batch
    with pytest.raises(EntryNotFoundError):
        find_batch(store, batch.id, "bob")
    (event,) = audit.read_events(store, newest=10)
    assert (event.action, event.subject) == ("batch.create", batch.id)


def test_batches_are_listed_newest_first_in_pages(store: Store) -> None:
    now = datetime.now(UTC)
    old, middle, new = (add_batch(store, created_at=now + timedelta(seconds=number)) for number in range(3))
    add_batch(store, owner="bob")
    page, more = read_batches(store, "alice", page=Page(2))
    assert (page, more) == ([new, middle], True)
    assert read_batches(store, "alice", page=Page(2, middle.id)) == ([old], False)
    assert len(read_batches(store, None, page=Page(10))[0]) == 4


def test_repeated_create_request_returns_the_existing_batch_if_that_batch_is_unfinished(store: Store) -> None:
    fields: dict[str, Any] = {"input_file": "file-1", "labels": '{"team": "a"}', "output_expires_s": 3600}
    first, without = add_batch(store, **fields), add_batch(store, input_file="file-1")
    assert add_batch(store, **fields, max_open=1) == first
    assert add_batch(store, input_file="file-1", max_open=1) == without != first
    begin_batch(store, first.id, total=3, model=None, lease=None)
    assert add_batch(store, **fields).id == first.id
    assert len(audit.read_events(store, newest=10)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"owner": "bob"},
        {"input_file": "file-2"},
        {"endpoint": "/v1/completions"},
        {"labels": '{"team": "b"}'},
        {"labels": None},
        {"output_expires_s": 7200},
        {"output_expires_s": None},
    ],
    ids=str,
)
def test_create_requests_that_differ_in_one_field_create_separate_batches(store: Store, change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"input_file": "file-1", "labels": '{"team": "a"}', "output_expires_s": 3600}
    assert add_batch(store, **fields).id != add_batch(store, **(fields | change)).id


def test_repeated_create_request_creates_a_new_batch_if_the_previous_batch_is_cancelled_or_ended(store: Store) -> None:
    first = add_batch(store, input_file="file-1")
    cancel(store, first.id)
    second = add_batch(store, input_file="file-1")
    end_batch(store, second.id, BatchResult(BatchStatus.COMPLETED), lease=None)
    assert len({first.id, second.id, add_batch(store, input_file="file-1").id}) == 3


def test_repeated_create_request_creates_a_new_batch_if_the_previous_batch_is_too_old(store: Store) -> None:
    first = add_batch(store, input_file="file-1", created_at=datetime.now(UTC) - REPEAT_WINDOW - timedelta(seconds=1))
    assert add_batch(store, input_file="file-1").id != first.id


@pytest.mark.slow
def test_twenty_concurrent_identical_requests_create_one_batch(store: Store) -> None:
    with ThreadPoolExecutor(20) as threads:
        created = list(threads.map(lambda _: add_batch(store, input_file="file-1"), range(20)))
    assert len({batch.id for batch in created}) == 1


def test_batch_is_refused_when_its_file_has_been_deleted(store: Store) -> None:
    with pytest.raises(EntryNotFoundError, match="file-gone") as caught:
        add_batch(store, input_file="file-gone", has_file=False)
    assert caught.value.param == "input_file_id"
    assert (read_open_batches(store), audit.read_events(store, newest=10)) == ([], [])


def test_batch_is_rejected_when_its_owner_has_too_many_unfinished_batches(store: Store) -> None:
    first = add_batch(store, max_open=1)
    with pytest.raises(TooManyBatchesError, match="1 unfinished batches"):
        add_batch(store, max_open=1)
    add_batch(store, max_open=1, owner="bob")
    end_batch(store, first.id, BatchResult(BatchStatus.COMPLETED), lease=None)
    add_batch(store, max_open=1)


def test_batch_status_goes_from_in_progress_to_finalizing_to_completed(store: Store) -> None:
    id = add_batch(store).id
    begun = begin_batch(store, id, total=3, model="tuned", lease=None)
    assert (begun.status, begun.total, begun.model) == (BatchStatus.IN_PROGRESS, 3, "tuned")
    assert begun.in_progress_at is not None
    recorded = record_batch_progress(store, id, PROGRESS, lease=None)
    assert (recorded.status, recorded.completed, recorded.failed) == (BatchStatus.IN_PROGRESS, 2, 1)
    assert record_batch_progress(store, id, PROGRESS, lease=None, finalizing=True).status is BatchStatus.FINALIZING
    assert [batch.id for batch in read_open_batches(store)] == [id]
    end_batch(store, id, BatchResult(BatchStatus.COMPLETED, PROGRESS, "file-out", "file-err"), lease=None)
    ended = find_batch(store, id, None)
    assert (ended.status, ended.output_file, ended.error_file) == (BatchStatus.COMPLETED, "file-out", "file-err")
    assert (ended.tokens_in, ended.tokens_out, ended.errors) == (30, 20, None)
    assert ended.finalizing_at is not None and ended.completed_at is not None and ended.cancelled_at is None
    assert read_open_batches(store) == []


def test_failed_batch_has_errors_with_line_numbers(store: Store) -> None:
    id = add_batch(store).id
    error = BatchError("invalid_json_line", "the line is not JSON", line=3)
    end_batch(store, id, BatchResult(BatchStatus.FAILED, errors=[error]), lease=None)
    failed = find_batch(store, id, None)
    assert failed.failed_at is not None and failed.errors is not None
    (stored,) = json.loads(failed.errors)
    assert BatchError(**stored) == error


def test_cancelled_batch_ends_as_cancelled_even_if_it_completes_before_cancellation_takes_effect(store: Store) -> None:
    id = add_batch(store).id
    cancelling = cancel(store, id)
    assert (cancelling.status, cancelling.cancelling_at is None) == (BatchStatus.CANCELLING, False)
    assert cancel(store, id) == cancelling  # sent again
    assert begin_batch(store, id, total=3, model=None, lease=None).status is BatchStatus.CANCELLING
    assert record_batch_progress(store, id, PROGRESS, lease=None, finalizing=True).status is BatchStatus.CANCELLING
    end_batch(store, id, BatchResult(BatchStatus.COMPLETED, PROGRESS, "file-out"), lease=None)
    cancelled = find_batch(store, id, None)
    assert (cancelled.status, cancelled.output_file) == (BatchStatus.CANCELLED, "file-out")
    assert cancelled.cancelled_at is not None and cancelled.completed_at is None
    assert cancel(store, id) == cancelled
    events = [event.action for event in audit.read_events(store, newest=10)]
    assert events == ["batch.create", "batch.cancel"]


def test_batch_that_has_ended_or_belongs_to_another_api_key_cannot_be_cancelled(store: Store) -> None:
    id = add_batch(store).id
    with pytest.raises(EntryNotFoundError):
        cancel(store, id, "bob")
    end_batch(store, id, BatchResult(BatchStatus.EXPIRED), lease=None)
    with pytest.raises(BatchEndedError, match="has already ended: expired"):
        cancel(store, id)


def test_server_that_lost_its_lease_cannot_change_a_batch(store: Store) -> None:
    batch, lost = add_batch(store), Lease("*", "another", 1)
    with pytest.raises(LeaseLostError):
        begin_batch(store, batch.id, total=3, model=None, lease=lost)
    with pytest.raises(LeaseLostError):
        record_batch_progress(store, batch.id, PROGRESS, lease=lost)
    with pytest.raises(LeaseLostError):
        end_batch(store, batch.id, BatchResult(BatchStatus.COMPLETED), lease=lost)
    assert find_batch(store, batch.id, None) == batch
