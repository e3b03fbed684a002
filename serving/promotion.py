"""The client's side of a promotion: change what is desired, then follow what the server does about it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Engine as Store

from svc.errors import NotFoundError
from svc.registry.registry import Registry
from svc.server_url import server_url
from svc.settings import Settings
from svc.store.database import open_database
from svc.store.desired import Desired, Target, change_desired, read_desired
from svc.store.swaps import SwapRecord, find_swap

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Promotion:
    """A change of what a running server serves."""

    settings: Settings
    registry: Registry
    store: Store

    @classmethod
    def of(cls, settings: Settings) -> "Promotion":
        """The promotion in one home.

        Raises:
            ServerNotRunningError: nobody would carry it out.
        """
        server_url(settings)
        return cls(settings, Registry.of(settings), open_database(settings.home))

    def current(self, name: str) -> Desired:
        """What a name serves.

        Raises:
            NotFoundError: no such name is served.
        """
        desired = read_desired(self.store, name)
        if desired is None:
            known = ", ".join(self.registry.names()) or "none"
            raise NotFoundError(f"{name!r} is not served", expected=f"a served name; the registry has {known}")
        return desired

    def change(self, seen: Desired, target: Target, on_step: Callable[[str], None]) -> SwapRecord:
        """Asks for a version, and returns when the server is done with it.

        Args:
            on_step: hears each step of the server once.

        Raises:
            BusyError: somebody else promoted at the same moment.
            ServerNotRunningError: the server ended meanwhile; it takes the wish up when it starts again.
        """
        wanted = change_desired(self.store, seen, target, previous=seen.target)
        told = 0
        while True:
            swap = find_swap(self.store, wanted.name, wanted.generation)
            if swap:
                for step in swap.steps[told:]:
                    on_step(step)
                told = len(swap.steps)
                if swap.outcome:
                    return swap
            server_url(self.settings)
            time.sleep(_POLL_S)
