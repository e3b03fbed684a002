"""Adds tables for servers and leases, and columns that record the server of each swap and serving period."""

import sqlalchemy as sa
from alembic import op

revision = "servers"
down_revision = "rollouts"


def upgrade() -> None:
    """Add the tables for servers and leases, and the columns that record the server of each swap and serving period."""
    op.create_table(
        "servers",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_servers"),
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("generation", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )
    for table in ("swaps", "served"):
        op.add_column(table, sa.Column("server", sa.String(), nullable=False, server_default=""))
