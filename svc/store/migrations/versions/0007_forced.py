"""Desired states: why a version that failed a check is served all the same."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Adds the column in place."""
    op.execute("ALTER TABLE desired ADD COLUMN forced VARCHAR")
