"""Adds tables for rollouts and webhooks, and the request log's columns that rollouts read."""

import sqlalchemy as sa
from alembic import op

revision = "rollouts"
down_revision = "drift"


def upgrade() -> None:
    """Add the tables for rollouts and webhooks, and the request log's columns that rollouts read."""
    op.create_table(
        "rollouts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("previous_number", sa.Integer(), nullable=False),
        sa.Column("previous_format", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("plan", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("requested_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("step_began_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("origin", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("forced", sa.String(), nullable=True),
        sa.Column("stop", sa.String(), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.String(), nullable=True),
        sa.Column("why", sa.String(), nullable=True),
        sa.Column("signals", sa.String(), nullable=False),
        sa.Column("gates", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_rollouts"),
    )
    op.create_index("ix_rollouts_name", "rollouts", ["name"])
    op.create_table(
        "rollout_steps",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("rollout_id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["rollout_id"], ["rollouts.id"], "fk_rollout_steps_rollout_id"),
        sa.PrimaryKeyConstraint("id", name="pk_rollout_steps"),
    )
    op.create_index("ix_rollout_steps_rollout_id", "rollout_steps", ["rollout_id"])
    op.create_table(
        "shadow_pairs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("rollout_id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("unit", sa.String(), nullable=False),
        sa.Column("production_failed", sa.Boolean(), nullable=False),
        sa.Column("candidate_failed", sa.Boolean(), nullable=False),
        sa.Column("production_valid", sa.Boolean(), nullable=True),
        sa.Column("candidate_valid", sa.Boolean(), nullable=True),
        sa.Column("agrees", sa.Boolean(), nullable=True),
        sa.Column("production_finish", sa.String(), nullable=True),
        sa.Column("candidate_finish", sa.String(), nullable=True),
        sa.Column("production_tokens", sa.Integer(), nullable=True),
        sa.Column("candidate_tokens", sa.Integer(), nullable=True),
        sa.Column("production_seconds", sa.Double(), nullable=False),
        sa.Column("candidate_seconds", sa.Double(), nullable=False),
        sa.Column("production_logprob", sa.Double(), nullable=True),
        sa.Column("candidate_logprob", sa.Double(), nullable=True),
        sa.Column("replayed", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["rollout_id"], ["rollouts.id"], "fk_shadow_pairs_rollout_id"),
        sa.PrimaryKeyConstraint("id", name="pk_shadow_pairs"),
    )
    op.create_index("ix_shadow_pairs_rollout_id", "shadow_pairs", ["rollout_id"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("body", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_deliveries"),
    )
    op.add_column("requests", sa.Column("unit", sa.String(), nullable=True))
    op.add_column("requests", sa.Column("valid", sa.Boolean(), nullable=True))
