"""What another server of the same store has written to it."""

from datetime import UTC, datetime

from sqlalchemy import Engine as Store
from sqlalchemy import insert

from serving.rollout.served import Began
from svc.store.leases import report_server
from svc.store.tables import ServedRow, target_columns
from svc.version import Target


def serve_elsewhere(store: Store, target: Target) -> None:
    """Record that another server is running and serves a version."""
    report_server(store, "another", "gpu-2:8000", [])
    row = {"server": "another", "generation": 1, "began_at": datetime.now(UTC), "began_by": Began.START}
    with store.begin() as connection:
        connection.execute(insert(ServedRow), row | target_columns(target))
