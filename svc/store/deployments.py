"""The models that a server serves: one row per name. Each model's version is in its desired state."""

from collections.abc import Collection
from datetime import UTC, datetime

from sqlalchemy import Engine as Store
from sqlalchemy import delete, select
from sqlalchemy.dialects.sqlite import insert

from svc.store.tables import DeploymentRow

_NAMES = select(DeploymentRow.name).order_by(DeploymentRow.added_at, DeploymentRow.name)
_ADD = insert(DeploymentRow).on_conflict_do_nothing()


def deployed_names(store: Store) -> list[str]:
    """Return the names, in the order in which they were added."""
    with store.connect() as connection:
        return list(connection.scalars(_NAMES))


def set_deployments(store: Store, names: Collection[str]) -> None:
    """Replace all names by these, in this order; an existing name keeps its position."""
    with store.begin() as connection:
        connection.execute(delete(DeploymentRow).where(DeploymentRow.name.not_in(names)))
        for name in names:
            connection.execute(_ADD, {"name": name, "added_at": datetime.now(UTC)})


def add_deployment(store: Store, name: str) -> None:
    """Add a name, unless it exists."""
    with store.begin() as connection:
        connection.execute(_ADD, {"name": name, "added_at": datetime.now(UTC)})


def remove_deployment(store: Store, name: str) -> bool:
    """Remove a name; return whether it existed."""
    with store.begin() as connection:
        return connection.execute(delete(DeploymentRow).where(DeploymentRow.name == name)).rowcount > 0
