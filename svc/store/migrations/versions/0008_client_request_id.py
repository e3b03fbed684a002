"""Requests: what the client called one, beside the server's own id."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Adds the column in place."""
    op.execute("ALTER TABLE requests ADD COLUMN client_request_id VARCHAR")
