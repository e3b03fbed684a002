"""Requests: how one ended, since a stream that broke has the status 200. Rows of before say it by their reason."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Adds the column in place."""
    op.execute("ALTER TABLE requests ADD COLUMN outcome VARCHAR")
