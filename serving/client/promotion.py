"""The client's side of a promotion: wish for a version, then follow what the server does about it.

Beside the server, in its home, through the store; from elsewhere through its API (serving.client.remote). Both write
the same desired state and read the same journal.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, Protocol

from sqlalchemy import Engine as Store

from serving.rollout.version_changes import VersionChange, VersionChanges
from svc.errors import BusyError, ServerNotRunningError
from svc.identity.actor import Actor
from svc.registry.registry import Registry
from svc.remote.server_url import ServerAddress, read_status, server_address
from svc.settings import Settings
from svc.store.database import open_database
from svc.store.swaps import SwapKind, SwapOutcome, SwapResult, find_swap
from svc.version import Format, Target, VersionId

_POLL_S = 0.1
_UNWRITTEN_S = 30.0
"""So long an end that the server knows may be on its way into the journal."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A swap, as far as it has come.

    Attributes:
        result: None while it is under way.
    """

    target: Target
    generation: int
    steps: tuple[str, ...]
    result: SwapResult | None


class Administration(Protocol):
    """What can be asked of a server, and where it is."""

    @property
    def server(self) -> ServerAddress:
        """Where it is asked for its status."""

    def promote(self, version: VersionId, format: Format | None, *, force: bool, reason: str | None) -> VersionChange:
        """See `VersionChanges.promote`."""

    def rollback(self, name: str, *, reason: str | None) -> VersionChange:
        """See `VersionChanges.rollback`."""

    def journal(self, name: str, generation: int | None = None) -> JournalEntry | None:
        """The last swap of a name, or that of a generation.

        Raises:
            ServerNotRunningError: the server does not answer.
        """

    def require_server(self) -> None:
        """Raises where nobody would carry a wish out.

        Raises:
            ServerNotRunningError: the server has ended.
        """


@dataclass(frozen=True, slots=True)
class LocalAdministration:
    """Of the server that uses a home, by whoever owns it."""

    settings: Settings
    registry: Registry
    store: Store
    server: ServerAddress

    @classmethod
    def of(cls, settings: Settings) -> "LocalAdministration":
        """That of one home.

        Raises:
            ServerNotRunningError: nobody would carry a wish out.
        """
        server = server_address(settings)
        return cls(settings, Registry.of(settings), open_database(settings.home), server)

    @property
    def _changes(self) -> VersionChanges:
        return VersionChanges(self.registry, self.store, lambda: read_served(self.server))

    def promote(self, version: VersionId, format: Format | None, *, force: bool, reason: str | None) -> VersionChange:
        """See `VersionChanges.promote`."""
        return self._changes.promote(version, format, force=force, reason=reason, actor=Actor.local())

    def rollback(self, name: str, *, reason: str | None) -> VersionChange:
        """See `VersionChanges.rollback`."""
        return self._changes.rollback(name, reason=reason, actor=Actor.local())

    def journal(self, name: str, generation: int | None = None) -> JournalEntry | None:
        """The last swap of a name, or that of a generation."""
        swap = find_swap(self.store, name, generation)
        return JournalEntry(swap.target, swap.generation, swap.steps, swap.result) if swap else None

    def require_server(self) -> None:
        """Raises where the server has ended."""
        server_address(self.settings)


def follow(administration: Administration, change: VersionChange, on_step: Callable[[str], None]) -> SwapResult:
    """Returns when the server is done with a wish, also where it cannot write that down.

    Args:
        change: one that has a generation.
        on_step: hears each step of the server once.

    Raises:
        BusyError: somebody else's wish came before the server took this one up.
        ServerNotRunningError: the server ended meanwhile; it takes the wish up when it starts again.
    """
    name, told, unwritten = change.target.version.name, 0, None
    next_look = time.monotonic() + _UNWRITTEN_S
    while True:
        swap = administration.journal(name, change.generation)
        if swap:
            for step in swap.steps[told:]:
                on_step(step)
            told = len(swap.steps)
            if swap.result:
                return swap.result
        else:
            _refuse_overtaken(administration, change)
        _refuse_without_server(administration, change)
        if time.monotonic() >= next_look:
            if unwritten:
                on_step("the server could not write the end into its journal, see its log; this is what it says")
                return unwritten
            unwritten = _told_result(administration.server, change)
            next_look = time.monotonic() + _UNWRITTEN_S
        time.sleep(_POLL_S)


def read_served(server: ServerAddress) -> dict[str, Target]:
    """What a server serves under each name, until it has come to what is desired.

    Raises:
        ServerNotRunningError: it does not answer.
    """
    return {
        model["model"]: Target(VersionId.parse(model["version"]), Format(model["format"]))
        for model in read_status(server)["models"]
    }


def swap_result(told: Mapping[str, Any]) -> SwapResult | None:
    """How a swap ended, from JSON; None where it has not."""
    if not told["outcome"]:
        return None
    values = {field.name: told[field.name] for field in fields(SwapResult)}
    kind = SwapKind(values["kind"]) if values["kind"] else None
    return SwapResult(**values | {"outcome": SwapOutcome(values["outcome"]), "kind": kind})


def _refuse_overtaken(administration: Administration, change: VersionChange) -> None:
    """The server takes up the newest wish only; one that came between is never begun."""
    last = administration.journal(change.target.version.name)
    if last and change.generation is not None and last.generation > change.generation:
        raise BusyError(
            f"somebody else promoted {last.target} before the server took up {change.target}",
            todo="see `svc status`, then try again",
        )


def _refuse_without_server(administration: Administration, change: VersionChange) -> None:
    try:
        administration.require_server()
    except ServerNotRunningError as error:
        raise ServerNotRunningError(
            f"the server ended before {change.target} served",
            todo=f"start it again, it takes {change.target} up: svc serve {change.target.version.name}",
        ) from error


def _told_result(server: ServerAddress, change: VersionChange) -> SwapResult | None:
    """How a swap ended, as the server's status says it; None where it does not."""
    with suppress(ServerNotRunningError):
        for model in read_status(server)["models"]:
            swap = model["last_swap"]
            if model["model"] == change.target.version.name and swap and swap["generation"] == change.generation:
                return swap_result(swap)
    return None
