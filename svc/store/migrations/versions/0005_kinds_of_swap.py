"""How a version came into the engines, and how long all of it took."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Adds the two columns; older swaps have neither."""
    op.add_column("swaps", sa.Column("kind", sa.String()))
    op.add_column("swaps", sa.Column("took_s", sa.Double()))
