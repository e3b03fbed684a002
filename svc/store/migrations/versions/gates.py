"""Adds the results of a rollout's gates."""

import sqlalchemy as sa
from alembic import op

revision = "gates"
down_revision = "rollouts"


def upgrade() -> None:
    """Add the column. It is empty for rollouts that were requested before there were gates."""
    op.add_column("rollouts", sa.Column("gates", sa.String(), nullable=True))
