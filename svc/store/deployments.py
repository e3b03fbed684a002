"""Which models a server shall serve: one row a name; which version of each, its desired state says."""

from collections.abc import Collection
from datetime import UTC, datetime

from sqlalchemy import Engine as Store
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from svc.store.tables import DeploymentRow

_NAMES = select(DeploymentRow.name).order_by(DeploymentRow.added_at, DeploymentRow.name)


def deployed_names(store: Store) -> list[str]:
    """The names, in the order in which they were added."""
    with store.connect() as connection:
        return list(connection.scalars(_NAMES))


def set_deployments(store: Store, names: Collection[str]) -> None:
    """From now on these and no others, in this order."""
    with Session(store) as session, session.begin():
        session.execute(delete(DeploymentRow).where(DeploymentRow.name.not_in(names)))
        for name in names:
            if session.get(DeploymentRow, name) is None:
                session.add(DeploymentRow(name=name, added_at=datetime.now(UTC)))


def add_deployment(store: Store, name: str) -> None:
    """From now on this one too."""
    with Session(store) as session, session.begin():
        if session.get(DeploymentRow, name) is None:
            session.add(DeploymentRow(name=name, added_at=datetime.now(UTC)))


def remove_deployment(store: Store, name: str) -> bool:
    """From now on this one no more; whether it was one."""
    with Session(store) as session, session.begin():
        row = session.get(DeploymentRow, name)
        if row is not None:
            session.delete(row)
        return row is not None
