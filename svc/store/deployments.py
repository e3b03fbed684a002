"""The models that a server serves, one row per name. The desired state of each model says which version is
served.
"""

from collections.abc import Collection
from datetime import UTC, datetime

from sqlalchemy import Connection, delete, select
from sqlalchemy import Engine as Store

from svc.store.database import announce_change, upsert, write_transaction
from svc.store.tables import DeploymentRow

_NAMES = select(DeploymentRow.name).order_by(DeploymentRow.added_at, DeploymentRow.name)


def deployed_names(store: Store) -> list[str]:
    """Return the names of all deployed models, in the order in which they were added."""
    with store.connect() as connection:
        return list(connection.scalars(_NAMES))


def set_deployments(store: Store, names: Collection[str]) -> None:
    """Deploy exactly the models with the given names. Models that are already deployed keep their positions, and new
    models follow in the given order.
    """
    with write_transaction(store) as connection:
        connection.execute(delete(DeploymentRow).where(DeploymentRow.name.not_in(names)))
        for name in names:
            _add(store, connection, name)
        announce_change(connection)


def add_deployment(store: Store, name: str) -> None:
    """Add a model to the deployments unless it is already deployed."""
    with write_transaction(store) as connection:
        _add(store, connection, name)
        announce_change(connection)


def remove_deployment(store: Store, name: str) -> bool:
    """Remove a model from the deployments and return whether it was deployed."""
    with write_transaction(store) as connection:
        announce_change(connection)
        return connection.execute(delete(DeploymentRow).where(DeploymentRow.name == name)).rowcount > 0


def _add(store: Store, connection: Connection, name: str) -> None:
    row = {"name": name, "added_at": datetime.now(UTC)}
    connection.execute(upsert(store, DeploymentRow).on_conflict_do_nothing(), row)
