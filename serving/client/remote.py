"""The administration of a server from another machine, with a key."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.client.promotion import JournalEntry, swap_result
from serving.rollout.version_changes import VersionChange
from svc.errors import ServerNotRunningError
from svc.remote.remote_server import RemoteServer
from svc.remote.server_url import ServerAddress
from svc.version import Format, Target, VersionId

_PAUSE_S = 0.5
_PATIENCE_S = 10.0
"""Time that the network may be down while a change is followed."""


@dataclass(frozen=True, slots=True)
class RemoteAdministration:
    """Administration through the server's API."""

    server: ServerAddress

    def promote(self, version: VersionId, format: Format | None, *, force: bool, reason: str | None) -> VersionChange:
        """See `VersionChanges.promote`."""
        body = {"version": str(version), "format": format and format.value, "force": force, "reason": reason}
        return _change(RemoteServer(self.server).post("/svc/promote", body))

    def rollback(self, name: str, *, reason: str | None) -> VersionChange:
        """See `VersionChanges.rollback`."""
        return _change(RemoteServer(self.server).post("/svc/rollback", {"model": name, "reason": reason}))

    def journal(self, name: str, generation: int | None = None) -> JournalEntry | None:
        """Return a name's last swap, or the swap for a generation."""
        query = {} if generation is None else {"generation": str(generation)}
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                swap = RemoteServer(self.server).get(f"/svc/swaps/{name}", **query)["swap"]
            except ServerNotRunningError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_PAUSE_S)
                continue
            return swap and JournalEntry(_target(swap), swap["generation"], tuple(swap["steps"]), swap_result(swap))

    def require_server(self) -> None:
        """Do nothing: the server has just answered `journal`."""


def _change(row: Mapping[str, Any]) -> VersionChange:
    return VersionChange(_target(row), _target(row["before"]), row["generation"], tuple(row["undecided"]))


def _target(row: Mapping[str, Any]) -> Target:
    return Target(VersionId.parse(row["version"]), Format(row["format"]))
