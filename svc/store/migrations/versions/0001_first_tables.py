"""Desired versions, swaps and their steps, retaken probes."""

import sqlalchemy as sa
from alembic import op

from svc.store.tables import UtcDateTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Creates the first tables."""
    op.create_table(
        "desired",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("previous_number", sa.Integer()),
        sa.Column("previous_format", sa.String()),
        sa.Column("changed_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_desired"),
    )
    op.create_table(
        "swaps",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=False),
        sa.Column("outcome", sa.String()),
        sa.Column("reason", sa.String()),
        sa.Column("seconds", sa.Double()),
        sa.Column("running", sa.Integer()),
        sa.Column("held", sa.Integer()),
        sa.PrimaryKeyConstraint("id", name="pk_swaps"),
    )
    op.create_table(
        "swap_steps",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("swap_id", sa.Integer(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["swap_id"], ["swaps.id"], name="fk_swap_steps_swap_id"),
        sa.PrimaryKeyConstraint("id", name="pk_swap_steps"),
    )
    op.create_index("ix_swap_steps_swap_id", "swap_steps", ["swap_id"])
    op.create_table(
        "retaken_probes",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("engine", sa.String(), nullable=False),
        sa.Column("probes", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("name", "number", "format", "engine", name="pk_retaken_probes"),
    )


def downgrade() -> None:
    """Drops them."""
    op.drop_table("retaken_probes")
    op.drop_table("swap_steps")
    op.drop_table("swaps")
    op.drop_table("desired")
