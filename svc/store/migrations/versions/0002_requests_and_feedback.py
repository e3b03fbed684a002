"""Requests that ended, and what people said of their answers."""

import sqlalchemy as sa
from alembic import op

from svc.store.tables import UtcDateTime

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Creates the two tables."""
    op.create_table(
        "requests",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("number", sa.Integer()),
        sa.Column("format", sa.String()),
        sa.Column("route", sa.String(), nullable=False),
        sa.Column("key_id", sa.String()),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("reason", sa.String()),
        sa.Column("finish_reason", sa.String()),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("first_token_seconds", sa.Double()),
        sa.Column("tokens_in", sa.Integer()),
        sa.Column("tokens_out", sa.Integer()),
        sa.Column("prompt", sa.String()),
        sa.Column("answer", sa.String()),
        sa.Column("bytes", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_requests"),
    )
    op.create_index("ix_requests_request_id", "requests", ["request_id"])
    op.create_index("ix_requests_started_at", "requests", ["started_at"])
    op.create_table(
        "feedback",
        sa.Column("request", sa.Integer(), nullable=False),
        sa.Column("given_at", UtcDateTime(), nullable=False),
        sa.Column("rating", sa.String(), nullable=False),
        sa.Column("label", sa.String()),
        sa.Column("correction", sa.String()),
        sa.PrimaryKeyConstraint("request", name="pk_feedback"),
        sa.ForeignKeyConstraint(["request"], ["requests.id"], name="fk_feedback_request", ondelete="CASCADE"),
    )


def downgrade() -> None:
    """Drops them."""
    op.drop_table("feedback")
    op.drop_table("requests")
