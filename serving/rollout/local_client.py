"""Administration of the server that uses a tuneserve home folder on this machine.

Changes are sent to the server through the socket in the home folder, so that the server's own settings apply: gates
and rollout steps may be configured by environment variables that the user's shell does not have. The journal of swaps
is read from the store, so that a change can be followed even after the server has died.
"""

from dataclasses import dataclass

from sqlalchemy import Engine as Store

from serving.rollout.remote_client import RemoteAdministration
from svc.remote.server_url import server_address
from svc.settings.settings import Settings
from svc.store.database import open_store
from svc.store.rollouts import RolloutView, read_rollouts
from svc.store.swaps import ServerSwap, server_swaps


@dataclass(frozen=True, slots=True)
class LocalAdministration(RemoteAdministration):
    """Administration of a server by the owner of its home folder, on the machine where the server runs."""

    settings: Settings
    store: Store

    @classmethod
    def of(cls, settings: Settings) -> "LocalAdministration":
        """Return the administration interface of the server that uses a tuneserve home folder.

        Raises:
            ServerNotRunningError: no server uses the home folder.
        """
        return cls(server_address(settings), settings, open_store(settings))

    def swaps(self, name: str, generation: int) -> list[ServerSwap]:
        """Return each server's progress in applying the given generation of a model's desired state."""
        return server_swaps(self.store, name, generation)

    def rollouts(self, name: str) -> list[RolloutView]:
        """Return all rollouts of a model, oldest first."""
        return [RolloutView.of(record) for record in read_rollouts(self.store, name)]

    def require_server(self) -> None:
        """Check that the server is still running."""
        server_address(self.settings)
