"""The tables of a new store, and triggers that keep the audit log as it is."""

import sqlalchemy as sa
from alembic import op

from svc.store.tables import UtcDateTime

revision = "initial"
down_revision = None

_SQLITE_GUARD = """
CREATE TRIGGER audit_no_{what} BEFORE {what} ON audit
BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
"""
_POSTGRES_GUARD = (
    """
    CREATE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$
    """,
    """
    CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change()
    """,
)


def upgrade() -> None:
    """Create all tables."""
    _create_versions()
    _create_requests()
    _create_quality()
    _create_keys()
    _create_audit()


def _create_versions() -> None:
    """Create what is served: desired versions, swaps, and their consequences."""
    op.create_table(
        "desired",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("previous_number", sa.Integer()),
        sa.Column("previous_format", sa.String()),
        sa.Column("changed_at", UtcDateTime(), nullable=False),
        sa.Column("forced", sa.String()),
        sa.PrimaryKeyConstraint("name", name="pk_desired"),
    )
    op.create_table(
        "deployments",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("added_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_deployments"),
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
        sa.Column("queued_s", sa.Double()),
        sa.Column("running", sa.Integer()),
        sa.Column("queued", sa.Integer()),
        sa.Column("kind", sa.String()),
        sa.Column("took_s", sa.Double()),
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
        "served",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("began_at", UtcDateTime(), nullable=False),
        sa.Column("began_by", sa.String(), nullable=False),
        sa.Column("ended_at", UtcDateTime()),
        sa.Column("ended_by", sa.String()),
        sa.PrimaryKeyConstraint("id", name="pk_served"),
    )
    op.create_index("ix_served_name", "served", ["name"])
    op.create_table(
        "retaken_probes",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("engine", sa.String(), nullable=False),
        sa.Column("probes", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("name", "number", "format", "engine", name="pk_retaken_probes"),
    )


def _create_requests() -> None:
    """Create requests and feedback on their answers."""
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
        sa.Column("temperature", sa.Double()),
        sa.Column("max_tokens", sa.Integer()),
        sa.Column("logprob", sa.Double()),
        sa.Column("client_request_id", sa.String()),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("user_hash", sa.String()),
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


def _create_quality() -> None:
    """Create runs of held-out sets, and drift."""
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
    op.create_table(
        "drift_states",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("signal", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("report", sa.String(), nullable=False),
        sa.Column("checked_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name", "number", "format", "signal", name="pk_drift_states"),
    )
    op.create_table(
        "drift_alarms",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("signal", sa.String(), nullable=False),
        sa.Column("since", UtcDateTime(), nullable=False),
        sa.Column("called_at", UtcDateTime(), nullable=False),
        sa.Column("ended_at", UtcDateTime()),
        sa.Column("moved", sa.String(), nullable=False),
        sa.Column("examples", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_drift_alarms"),
    )


def _create_keys() -> None:
    """Create keys and their usage."""
    op.create_table(
        "keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.Column("scopes", sa.String(), nullable=False),
        sa.Column("models", sa.String()),
        sa.Column("requests_per_minute", sa.Integer()),
        sa.Column("tokens_in_per_minute", sa.Integer()),
        sa.Column("tokens_out_per_minute", sa.Integer()),
        sa.Column("concurrent", sa.Integer()),
        sa.Column("tokens_per_day", sa.BigInteger()),
        sa.Column("weight", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime()),
        sa.Column("revoked_at", UtcDateTime()),
        sa.Column("previous_hash", sa.String()),
        sa.Column("previous_until", UtcDateTime()),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
    )
    op.create_index("ix_keys_revision", "keys", ["revision"])
    op.create_table(
        "usage",
        sa.Column("hour", UtcDateTime(), nullable=False),
        sa.Column("key_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("tokens_in", sa.BigInteger(), nullable=False),
        sa.Column("tokens_out", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("hour", "key_id", "model", name="pk_usage"),
    )


def _create_audit() -> None:
    """Create the audit log and its triggers."""
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("at", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("origin", sa.String(), nullable=False),
        sa.Column("reason", sa.String()),
        sa.Column("details", sa.String(), nullable=False),
        sa.Column("previous_hash", sa.String(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    if op.get_bind().dialect.name == "sqlite":
        guards = tuple(_SQLITE_GUARD.format(what=what) for what in ("UPDATE", "DELETE"))
    else:
        guards = _POSTGRES_GUARD
    for guard in guards:
        op.execute(guard)
