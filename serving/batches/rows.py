"""Batches of requests, with one row per batch.

A batch's owner creates and cancels it. All other status changes are made by the server that runs batches
(serving.batches):

    validating ──▶ in_progress ──▶ finalizing ──▶ completed, expired
        │               │              │
        ├───────────────┴──────────────┴────────▶ failed
        └───────────────┴──────────────┴────────▶ cancelling ──▶ cancelled
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from sqlalchemy import Engine as Store
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from serving.http.page import REPEAT_WINDOW, Page, find_row, owned_by, read_page, require_fewer
from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import RefusedError, SvcError
from svc.store.audit import AuditEntry, append_event
from svc.store.database import announce_change, exclusive
from svc.store.leases import Lease, require_lease
from svc.store.statuses import BatchStatus
from svc.store.tables import BatchRow, FileRow

_OPEN = [status.value for status in BatchStatus if not status.ended]


@answered_with(429, ErrorCode.RATE_LIMIT_EXCEEDED)
class TooManyBatchesError(SvcError):
    """Raised when an owner has too many unfinished batches."""


@answered_with(400, ErrorCode.BATCH_ENDED)
class BatchEndedError(RefusedError):
    """Raised on an attempt to cancel a batch that has ended."""


@dataclass(frozen=True, slots=True)
class BatchError:
    """A reason why a batch failed, as shown to its owner. It contains no paths on the server's machine.

    Attributes:
        line: line number in the input file, starting at 1, or None.
        param: field that caused the failure, or None.
    """

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """Progress of a batch.

    Attributes:
        completed, failed: numbers of answered and failed requests.
        tokens_in, tokens_out: numbers of prompt and answer tokens in the answered requests.
    """

    completed: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True, slots=True)
class BatchResult:
    """Outcome of a batch.

    Attributes:
        output_file, error_file: ids of the files with the answered and the failed requests; None if there is no such
            file.
        errors: why the batch failed.
    """

    status: BatchStatus
    progress: BatchProgress = BatchProgress()
    output_file: str | None = None
    error_file: str | None = None
    errors: Sequence[BatchError] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of requests.

    Attributes:
        owner: id of the key that created the batch; empty for requests without a key.
        model: the model that all requests name, or None if unknown or if the requests name several models.
        labels: the client's metadata as JSON with sorted keys, or None.
        output_expires_s: lifetime of the result files in seconds, or None if they do not expire.
        errors: JSON list of the fields of `BatchError`, or None unless the batch failed.
        total: number of requests, or 0 until the input file has been validated.
    """

    id: str
    owner: str
    input_file: str
    endpoint: str
    completion_window: str
    created_at: datetime
    expires_at: datetime
    model: str | None = None
    status: BatchStatus = BatchStatus.VALIDATING
    labels: str | None = None
    output_expires_s: int | None = None
    errors: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    in_progress_at: datetime | None = None
    finalizing_at: datetime | None = None
    completed_at: datetime | None = None
    failed_at: datetime | None = None
    expired_at: datetime | None = None
    cancelling_at: datetime | None = None
    cancelled_at: datetime | None = None
    output_file: str | None = None
    error_file: str | None = None


def create_batch(store: Store, batch: Batch, entry: AuditEntry, *, max_open: int) -> Batch:
    """Add a batch and return it. If an identical request, made less than `REPEAT_WINDOW` ago, created a batch that
    is still unfinished, return that batch instead.

    Args:
        entry: audit event to record for the creation.
        max_open: maximum number of unfinished batches of one owner.

    Raises:
        EntryNotFoundError: the batch's input file has been deleted.
        TooManyBatchesError: the owner already has `max_open` unfinished batches.
    """
    with exclusive(store) as session:
        if repeated := session.scalar(_equal_to(batch)):
            return repeated.read(Batch)
        find_row(session, FileRow, batch.input_file, None, "file", param="input_file_id")
        is_open, todo = BatchRow.status.in_(_OPEN), "wait until a batch has ended, or cancel a batch"
        require_fewer(session, BatchRow, batch.owner, is_open, max_open, TooManyBatchesError, noun="batches", todo=todo)
        session.add(BatchRow.of(batch))
        append_event(session, entry)
        announce_change(session.connection())
    return batch


def _equal_to(batch: Batch) -> Select[BatchRow]:
    """Return a query for unfinished batches that were recently created by a request identical to that of the given
    batch. Batches that are being cancelled are excluded.
    """
    return select(BatchRow).where(
        BatchRow.owner == batch.owner,
        BatchRow.input_file == batch.input_file,
        BatchRow.endpoint == batch.endpoint,
        BatchRow.completion_window == batch.completion_window,
        BatchRow.labels.is_not_distinct_from(batch.labels),
        BatchRow.output_expires_s.is_not_distinct_from(batch.output_expires_s),
        BatchRow.status.in_(_OPEN),
        BatchRow.status != BatchStatus.CANCELLING.value,
        BatchRow.created_at > datetime.now(UTC) - REPEAT_WINDOW,
    )


def find_batch(store: Store, id: str, owner: str | None) -> Batch:
    """Return the batch with the given id.

    Args:
        owner: the owner whose batches are searched; None for all owners.

    Raises:
        EntryNotFoundError: the owner has no batch with this id.
    """
    with Session(store) as session:
        return find_row(session, BatchRow, id, owner, "batch").read(Batch)


def read_batches(store: Store, owner: str | None, *, page: Page) -> tuple[list[Batch], bool]:
    """Return one page of an owner's batches, and whether another page follows.

    Args:
        owner: id of the owner, or None for the batches of all owners.
    """
    return read_page(store, BatchRow, Batch, owned_by(BatchRow, owner), page)


def cancel_batch(store: Store, id: str, owner: str | None, entry: AuditEntry) -> Batch:
    """Request the cancellation of a batch, and return the batch. If it is already being cancelled, nothing changes.

    Args:
        owner: the owner whose batches are searched; None for all owners.
        entry: audit event to record for the change.

    Raises:
        EntryNotFoundError: the owner has no batch with this id.
        BatchEndedError: the batch has already completed, failed or expired.
    """
    with exclusive(store) as session:
        row = find_row(session, BatchRow, id, owner, "batch")
        status = BatchStatus(row.status)
        if status.ended and status is not BatchStatus.CANCELLED:
            raise BatchEndedError(f"batch {row.id} has already ended: {status}")
        if not status.ended and status is not BatchStatus.CANCELLING:
            row.status, row.cancelling_at = BatchStatus.CANCELLING.value, datetime.now(UTC)
            append_event(session, entry)
            announce_change(session.connection())
        return row.read(Batch)


def read_open_batches(store: Store) -> list[Batch]:
    """Return all batches that have not ended, oldest first."""
    query = select(BatchRow).where(BatchRow.status.in_(_OPEN)).order_by(BatchRow.created_at, BatchRow.id)
    with Session(store) as session:
        return [row.read(Batch) for row in session.scalars(query)]


def begin_batch(store: Store, id: str, *, total: int, model: str | None, lease: Lease | None) -> Batch:
    """Set a batch's status to `in_progress` once its input file has been validated, and return the batch. A batch that
    is being cancelled keeps its status.

    Args:
        total: number of requests in the batch.
        lease: lease of the server that runs batches; see `svc.store.leases.require_lease`.

    Raises:
        LeaseLostError: another server runs batches now.
    """
    with exclusive(store) as session:
        require_lease(session, lease)
        row = session.get_one(BatchRow, id)
        row.total, row.model = total, model
        if row.status == BatchStatus.VALIDATING.value:
            row.status, row.in_progress_at = BatchStatus.IN_PROGRESS.value, datetime.now(UTC)
        return row.read(Batch)


def record_batch_progress(
    store: Store, id: str, progress: BatchProgress, *, lease: Lease | None, finalizing: bool = False
) -> Batch:
    """Record the progress of a batch, and return the batch.

    Args:
        finalizing: whether the batch moves to `finalizing`, unless it is being cancelled.
        lease: see `begin_batch`.

    Raises:
        LeaseLostError: another server runs batches now.
    """
    with exclusive(store) as session:
        require_lease(session, lease)
        row = session.get_one(BatchRow, id)
        _set_progress(row, progress)
        if finalizing and row.status == BatchStatus.IN_PROGRESS.value:
            row.status, row.finalizing_at = BatchStatus.FINALIZING.value, datetime.now(UTC)
        return row.read(Batch)


def end_batch(store: Store, id: str, result: BatchResult, *, lease: Lease | None) -> None:
    """End a batch. If it is being cancelled, its status becomes `cancelled` instead of the result's status.

    Args:
        lease: see `begin_batch`.

    Raises:
        LeaseLostError: another server runs batches now.
    """
    with exclusive(store) as session:
        require_lease(session, lease)
        row = session.get_one(BatchRow, id)
        cancelled = row.status == BatchStatus.CANCELLING.value and result.status is not BatchStatus.FAILED
        status = BatchStatus.CANCELLED if cancelled else result.status
        _set_progress(row, result.progress)
        row.status, row.output_file, row.error_file = status.value, result.output_file, result.error_file
        row.errors = json.dumps([asdict(error) for error in result.errors]) if result.errors else None
        setattr(row, f"{status.value}_at", datetime.now(UTC))


def _set_progress(row: BatchRow, progress: BatchProgress) -> None:
    row.completed, row.failed = progress.completed, progress.failed
    row.tokens_in, row.tokens_out = progress.tokens_in, progress.tokens_out
