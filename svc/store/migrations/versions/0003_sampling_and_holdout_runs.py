"""How a request was sampled and how likely its answer is; the held-out set, asked again."""

import sqlalchemy as sa
from alembic import op

from svc.store.tables import UtcDateTime

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds three columns and a table."""
    op.add_column("requests", sa.Column("temperature", sa.Double()))
    op.add_column("requests", sa.Column("max_tokens", sa.Integer()))
    op.add_column("requests", sa.Column("logprob", sa.Double()))
    op.create_table(
        "holdout_runs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("engine", sa.String(), nullable=False),
        sa.Column("cause", sa.String(), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=False),
        sa.Column("ended_at", UtcDateTime(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("reason", sa.String()),
        sa.Column("results", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_holdout_runs"),
    )


def downgrade() -> None:
    """Drops them."""
    op.drop_table("holdout_runs")
    with op.batch_alter_table("requests") as table:
        for column in ("logprob", "max_tokens", "temperature"):
            table.drop_column(column)
