"""Adds tables for drift features and for traffic that was accepted as the new reference, and a column for the feature
that an alarm is about. Deletes the drift states and alarms of earlier releases."""

import sqlalchemy as sa
from alembic import op

revision = "drift"
down_revision = "initial"


def upgrade() -> None:
    """Add the tables and the column for drift features, and delete earlier releases' alarms and drift states."""
    op.create_table(
        "drift_items",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("request", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("features", sa.String(), nullable=False),
        sa.Column("topic", sa.LargeBinary(), nullable=False),
        sa.Column("wanted", sa.LargeBinary(), nullable=False),
        sa.Column("words", sa.LargeBinary(), nullable=False),
        sa.Column("conversation", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["request"], ["requests.id"], "fk_drift_items_request", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_drift_items"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_drift_items_request", "drift_items", ["request"], unique=True)
    op.create_index("ix_drift_items_target", "drift_items", ["name", "number", "format"])
    op.create_table(
        "drift_baselines",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name", "number", "format", name="pk_drift_baselines"),
    )
    op.execute("DELETE FROM drift_alarms")
    op.execute("DELETE FROM drift_states")
    op.add_column("drift_alarms", sa.Column("feature", sa.String(), nullable=False, server_default=""))
