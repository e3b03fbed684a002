"""Swaps: the words of the queue. Requests that waited were called held, and how long they did, seconds."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Renames the two columns in place: Alembic would copy the table on SQLite, and steps refer to its rows."""
    op.execute("ALTER TABLE swaps RENAME COLUMN held TO queued")
    op.execute("ALTER TABLE swaps RENAME COLUMN seconds TO queued_s")
