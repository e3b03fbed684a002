"""Add the table of features of requests for drift."""

import sqlalchemy as sa
from alembic import op

revision = "drift_items"
down_revision = "initial"


def upgrade() -> None:
    """Create the table and its indexes."""
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
