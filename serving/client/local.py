"""Administration of the server that uses a home on this machine.

Changes are sent to the server, through the socket in the home, so that the server's own settings apply: a shell
rarely has the gates and rollout steps of the service's environment. The journal is read from the store, so that a
change can be followed even after the server has died.
"""

from dataclasses import dataclass

from sqlalchemy import Engine as Store

from serving.client.promotion import JournalEntry
from serving.client.remote import RemoteAdministration
from serving.rollout.promotion import PromotionRequest, VersionChange
from svc.remote.server_url import ServerAddress, server_address
from svc.settings import Settings
from svc.store.database import open_store
from svc.store.rollouts import RolloutView, read_rollouts
from svc.store.swaps import find_swap


@dataclass(frozen=True, slots=True)
class LocalAdministration:
    """Administration of a server by the home's owner, on the machine where it runs."""

    settings: Settings
    store: Store
    server: ServerAddress

    @classmethod
    def of(cls, settings: Settings) -> "LocalAdministration":
        """Return the administration of the server that uses a home.

        Raises:
            ServerNotRunningError: no server uses the home.
        """
        return cls(settings, open_store(settings), server_address(settings))

    def promote(self, request: PromotionRequest) -> VersionChange:
        """Promote a version; see `VersionChanges.promote`."""
        return RemoteAdministration(self.server).promote(request)

    def rollback(self, name: str, *, reason: str | None) -> VersionChange:
        """Roll a model back; see `VersionChanges.rollback`."""
        return RemoteAdministration(self.server).rollback(name, reason=reason)

    def journal(self, name: str, generation: int | None = None) -> JournalEntry | None:
        """Return a model's last swap, or the swap for a given generation of its desired state."""
        swap = find_swap(self.store, name, generation)
        return JournalEntry(swap.target, swap.generation, swap.steps, swap.result) if swap else None

    def rollouts(self, name: str) -> list[RolloutView]:
        """Return all rollouts of a model, oldest first."""
        return [RolloutView.of(record) for record in read_rollouts(self.store, name)]

    def require_server(self) -> None:
        """Check that the server is still running."""
        server_address(self.settings)
