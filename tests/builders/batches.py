"""Builds batches in the store, with the rows of their input files."""

from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy import update

from serving.batches.rows import Batch, create_batch
from serving.files.rows import Purpose
from svc.store.audit import Action, AuditEntry
from svc.store.statuses import BatchStatus
from svc.store.tables import BatchRow
from tests.builders.actors import ALICE_KEY
from tests.file_row import add_file_row

_NUMBERS = count(1)
_ENDED_AT = {"completed": "completed_at", "failed": "failed_at", "expired": "expired_at", "cancelled": "cancelled_at"}


def add_batch(store: Store, *, max_open: int = 100, has_file: bool = True, **fields: Any) -> Batch:
    """Create a batch of the key `alice`.

    Args:
        max_open: how many unfinished batches the owner may have.
        has_file: whether the input file exists.
        fields: fields of the batch that differ from the defaults.
    """
    now = datetime.now(UTC)
    defaults: dict[str, Any] = {
        "id": f"batch_{next(_NUMBERS)}",
        "owner": "alice",
        "input_file": f"file-{next(_NUMBERS)}",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "created_at": now,
        "expires_at": now + timedelta(hours=24),
    }
    batch = Batch(**(defaults | fields))
    if has_file:
        add_file_row(store, batch.input_file, owner=batch.owner, purpose=Purpose.BATCH)
    return create_batch(store, batch, AuditEntry(Action.CREATE_BATCH, batch.id, ALICE_KEY), max_open=max_open)


def end_batch(store: Store, batch: Batch, status: BatchStatus, at: datetime) -> None:
    """End a batch that has written the file `file-out`, at a time."""
    values = {"status": status.value, _ENDED_AT[status.value]: at, "output_file": "file-out"}
    with store.begin() as connection:
        connection.execute(update(BatchRow).where(BatchRow.id == batch.id), values)
