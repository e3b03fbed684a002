"""Stores webhook messages that are waiting for delivery. A message is deleted once its receiver has
accepted it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from uuid import uuid4

from sqlalchemy import Engine as Store
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from svc.store.database import write_transaction
from svc.store.tables import WebhookDeliveryRow


class WebhookOutcome(StrEnum):
    """Outcome of an attempt to deliver a webhook message."""

    DELIVERED = "delivered"
    FAILED = "failed"
    """The receiver did not accept the message; the delivery is retried."""
    DROPPED = "dropped"
    """The server has given up on the message, and does not retry the delivery."""


@dataclass(frozen=True, slots=True)
class WebhookDelivery:
    """A webhook message to one receiver.

    Attributes:
        message: id of the message, the same in every attempt.
        body: JSON text, the same in every attempt.
        attempts: number of failed attempts.
    """

    id: int
    message: str
    url: str
    body: str
    created_at: datetime
    attempts: int


def add_deliveries(session: Session, urls: Collection[str], body: str) -> None:
    """Store a webhook message for each receiver, in the same transaction as the change that the message reports."""
    now = datetime.now(UTC)
    message = f"msg_{uuid4().hex}"
    for url in urls:
        session.add(WebhookDeliveryRow(message=message, url=url, body=body, created_at=now, attempts=0, due_at=now))


def due_deliveries(store: Store, url: str, limit: int) -> list[WebhookDelivery]:
    """Return the messages that are due to be sent to a receiver, oldest first."""
    row = WebhookDeliveryRow
    query = select(row).where(row.url == url, row.due_at <= datetime.now(UTC)).order_by(row.id).limit(limit)
    with Session(store) as session:
        return [each.read(WebhookDelivery) for each in session.scalars(query)]


def postpone_delivery(store: Store, delivery: int, due_at: datetime) -> None:
    """Record a failed delivery attempt and the time of the next attempt."""
    row = WebhookDeliveryRow
    with store.begin() as connection:
        connection.execute(update(row).where(row.id == delivery).values(attempts=row.attempts + 1, due_at=due_at))


def remove_delivery(store: Store, delivery: int) -> None:
    """Remove a webhook message that was delivered or is no longer retried."""
    with Session(store) as session, session.begin():
        session.execute(delete(WebhookDeliveryRow).where(WebhookDeliveryRow.id == delivery))


def drop_deliveries(store: Store, url: str, *, before: datetime, keep: int) -> int:
    """Remove a receiver's messages that are older than the given time, and then all but its newest `keep` messages.

    Return the number of messages removed.
    """
    row = WebhookDeliveryRow
    newest = select(row.id).where(row.url == url).order_by(row.id.desc()).limit(keep)
    old = (row.url == url) & ((row.created_at < before) | row.id.not_in(newest))
    with Session(store) as session:
        if session.scalar(select(row.id).where(old).limit(1)) is None:
            return 0
    with write_transaction(store) as connection:
        return connection.execute(delete(row).where(old)).rowcount
