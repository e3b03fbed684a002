"""Administration of a server from another machine, authenticated by an API key."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter

from serving.rollout.promotion import PromotionRequest, VersionChange
from svc.errors import ServerNotRunningError
from svc.remote.remote_server import RemoteServer
from svc.remote.server_url import ServerAddress
from svc.store.gate_rows import GATE_ROWS
from svc.store.rollouts import RolloutView
from svc.store.swaps import ServerSwap, SwapRecord, SwapResult
from svc.version import Format, Target, VersionId

_RESULT = TypeAdapter(SwapResult)
_PAUSE_S = 0.5
_PATIENCE_S = 10.0
"""Longest network outage that is tolerated while a change is being followed, in seconds."""
_GATES_S = 900.0
"""Maximum time to wait while the server checks a promotion's gates, in seconds. Gates may run configured commands."""


@dataclass(frozen=True, slots=True)
class RemoteAdministration:
    """Administration of a server through its API."""

    server: ServerAddress

    def promote(self, request: PromotionRequest) -> VersionChange:
        """Promote a version; see `VersionChanges.promote`."""
        values = asdict(request)
        body = values | values.pop("steps") | {"version": str(request.version)}
        return _change(RemoteServer(self.server).post("/svc/promote", body, timeout_s=_GATES_S))

    def rollback(self, name: str, *, reason: str | None) -> VersionChange:
        """Roll a model back; see `VersionChanges.rollback`."""
        return _change(RemoteServer(self.server).post("/svc/rollback", {"model": name, "reason": reason}))

    def swaps(self, name: str, generation: int) -> list[ServerSwap]:
        """Return each server's progress in applying the given generation of a model's desired state.

        See `svc.store.swaps.server_swaps`.

        Raises:
            ServerNotRunningError: the server is not responding.
        """
        return [
            ServerSwap(
                row["server"],
                row["address"],
                row["running"],
                row["swap"] and _swap(row["swap"]),
                row["later"] and _target(row["later"]),
            )
            for row in self._get(f"/svc/swaps/{name}", generation=str(generation))["servers"]
        ]

    def rollouts(self, name: str) -> list[RolloutView]:
        """Return all rollouts of a model, oldest first.

        Raises:
            ServerNotRunningError: the server is not responding.
        """
        return [RolloutView.model_validate(row) for row in self._get(f"/svc/rollouts/{name}")["rollouts"]]

    def _get(self, path: str, **query: str) -> Mapping[str, Any]:
        """Fetch a path and return its JSON, retrying during short network outages."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return RemoteServer(self.server).get(path, **query)
            except ServerNotRunningError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_PAUSE_S)

    def require_server(self) -> None:
        """Check that the server is still running, so that it can apply a change. This does nothing, because a
        successful call to `swaps` has just shown that the server is running.
        """


def swap_result(row: Mapping[str, Any]) -> SwapResult | None:
    """Parse a swap's result from JSON. Return None if the swap has not ended."""
    return _RESULT.validate_python(row) if row["outcome"] else None


def _change(row: Mapping[str, Any]) -> VersionChange:
    return VersionChange(
        _target(row),
        _target(row["before"]),
        row["generation"],
        row["rollout"],
        GATE_ROWS.validate_python(row["gates"]),
        row["refused"],
    )


def _swap(row: Mapping[str, Any]) -> SwapRecord:
    started_at = datetime.fromisoformat(row["started_at"])
    return SwapRecord(row["id"], _target(row), row["generation"], started_at, swap_result(row), tuple(row["steps"]))


def _target(row: Mapping[str, Any]) -> Target:
    return Target(VersionId.parse(row["version"]), Format(row["format"]))
