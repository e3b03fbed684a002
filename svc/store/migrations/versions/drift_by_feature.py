"""An alarm of drift is of one feature; traffic can be accepted. What the windows before found is dropped."""

import sqlalchemy as sa
from alembic import op

revision = "drift_by_feature"
down_revision = "drift_items"


def upgrade() -> None:
    """Change the tables."""
    op.execute("DELETE FROM drift_alarms")
    op.execute("DELETE FROM drift_states")
    op.add_column("drift_alarms", sa.Column("feature", sa.String(), nullable=False, server_default=""))
    op.create_table(
        "drift_baselines",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name", "number", "format", name="pk_drift_baselines"),
    )
