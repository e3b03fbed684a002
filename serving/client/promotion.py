"""The client side of a promotion: changes the desired version, then follows the swap on the server.

On the server's machine, it uses the home's store; elsewhere, it uses the server's API (serving.client.remote).
Both ways write the same desired state and read the same journal.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, Protocol

from serving.rollout.promotion import PromotionRequest, VersionChange
from svc.errors import BusyError, NotFoundError, ServerNotRunningError
from svc.remote.server_url import ServerAddress, read_status
from svc.store.rollouts import RolloutView
from svc.store.swaps import SwapKind, SwapOutcome, SwapResult
from svc.version import Format, Target, VersionId

_POLL_S = 0.1
_ROLLOUT_POLL_S = 0.5
_SOON_S = 5.0
"""How often to ask the server, in seconds, and for how long a rollout is followed as closely as a swap: a rollback
ends within that time."""
_UNWRITTEN_S = 30.0
"""How long the server may take to write a result to the journal, in seconds."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A swap recorded in the journal.

    Attributes:
        result: result of the swap, or None while it is in progress.
    """

    target: Target
    generation: int
    steps: tuple[str, ...]
    result: SwapResult | None


class Administration(Protocol):
    """Interface for changing the desired versions of a local or remote server and reading its swap journal."""

    @property
    def server(self) -> ServerAddress:
        """Address of the server, used to read its status."""

    def promote(self, request: PromotionRequest) -> VersionChange:
        """Promote a version; see `VersionChanges.promote`."""

    def rollback(self, name: str, *, reason: str | None) -> VersionChange:
        """Roll a model back; see `VersionChanges.rollback`."""

    def journal(self, name: str, generation: int | None = None) -> JournalEntry | None:
        """Return a model's last swap, or the swap for a given generation of its desired state.

        Raises:
            ServerNotRunningError: the server does not respond.
        """

    def rollouts(self, name: str) -> list[RolloutView]:
        """Return all rollouts of a model, oldest first.

        Raises:
            ServerNotRunningError: the server does not respond.
        """

    def require_server(self) -> None:
        """Check that a server is running to carry out a change.

        Raises:
            ServerNotRunningError: the server has stopped.
        """


def follow(administration: Administration, change: VersionChange, on_step: Callable[[str], None]) -> SwapResult:
    """Wait until the server has carried out a change, and return the result.

    If the server could not write the result to its journal, the result is read from the server's status after a
    longer wait.

    Args:
        change: the change to follow, which must have a generation.
        on_step: called with the text of each step, once per step.

    Raises:
        BusyError: another change was made before the server began this one.
        ServerNotRunningError: the server stopped in the meantime. It will carry out the change after its
            next start.
    """
    name, shown, unwritten = change.target.version.name, 0, None
    next_check = time.monotonic() + _UNWRITTEN_S
    while True:
        swap = administration.journal(name, change.generation)
        if swap:
            for step in swap.steps[shown:]:
                on_step(step)
            shown = len(swap.steps)
            if swap.result:
                return swap.result
        else:
            _refuse_overtaken(administration, change)
        _refuse_without_server(administration, change)
        if time.monotonic() >= next_check:
            if unwritten:
                on_step("the server could not write the result to its journal (see its log); its status shows it")
                return unwritten
            unwritten = _result_from_status(administration.server, change)
            next_check = time.monotonic() + _UNWRITTEN_S
        time.sleep(_POLL_S)


def follow_rollout(
    administration: Administration, name: str, rollout: int, on_step: Callable[[str], None]
) -> RolloutView:
    """Wait until a rollout has ended, and return its final state.

    Args:
        on_step: called with the text of each step, once per step.

    Raises:
        ServerNotRunningError: the server stopped in the meantime. It will continue the rollout after its next
            start.
    """
    shown, soon = 0, time.monotonic() + _SOON_S
    while True:
        seen = next((view for view in administration.rollouts(name) if view.id == rollout), None)
        if seen is None:
            raise NotFoundError(f"the model {name!r} has no rollout {rollout}")
        for step in seen.steps[shown:]:
            on_step(step)
        shown = len(seen.steps)
        if seen.outcome is not None:
            return seen
        try:
            administration.require_server()
        except ServerNotRunningError as error:
            raise ServerNotRunningError(
                f"the server stopped during the rollout of {seen.version}",
                todo=f"start the server again; it continues the rollout: svc serve {name}",
            ) from error
        time.sleep(_POLL_S if time.monotonic() < soon else _ROLLOUT_POLL_S)


def read_served(server: ServerAddress) -> dict[str, Target]:
    """Return the version and format that a server currently serves for each model, keyed by model name.

    It may not be the desired version yet.

    Raises:
        ServerNotRunningError: the server does not respond.
    """
    return {
        model["model"]: Target(VersionId.parse(model["version"]), Format(model["format"]))
        for model in read_status(server)["models"]
    }


def swap_result(row: Mapping[str, Any]) -> SwapResult | None:
    """Parse a swap's result from JSON. Return None if the swap has not ended."""
    if not row["outcome"]:
        return None
    values = {field.name: row[field.name] for field in fields(SwapResult)}
    kind = SwapKind(values["kind"]) if values["kind"] else None
    return SwapResult(**values | {"outcome": SwapOutcome(values["outcome"]), "kind": kind})


def _refuse_overtaken(administration: Administration, change: VersionChange) -> None:
    """Raise an error if the change was superseded by a newer one before the server began it.

    The server carries out only the newest change.
    """
    last = administration.journal(change.target.version.name)
    if last and change.generation is not None and last.generation > change.generation:
        raise BusyError(
            f"{last.target} was promoted before the server began the promotion of {change.target}",
            todo="see `svc status`, then try again",
        )


def _refuse_without_server(administration: Administration, change: VersionChange) -> None:
    try:
        administration.require_server()
    except ServerNotRunningError as error:
        raise ServerNotRunningError(
            f"the server stopped before {change.target} was served",
            todo=f"start the server again; it will serve {change.target}: svc serve {change.target.version.name}",
        ) from error


def _result_from_status(server: ServerAddress, change: VersionChange) -> SwapResult | None:
    """Return a swap's result as shown in the server's status, or None if the status does not contain it."""
    with suppress(ServerNotRunningError):
        for model in read_status(server)["models"]:
            swap = model["last_swap"]
            if model["model"] == change.target.version.name and swap and swap["generation"] == change.generation:
                return swap_result(swap)
    return None
