"""The client's side of a promotion: change what is desired, then follow what the server does about it."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Engine as Store

from svc.errors import BusyError, NotFoundError, ServerNotRunningError
from svc.registry.registry import Registry
from svc.server_url import ServerAddress, read_status, server_address
from svc.settings import Settings
from svc.store.audit import AuditEntry
from svc.store.database import open_database
from svc.store.desired import Desired, change_desired, read_desired
from svc.store.swaps import SwapKind, SwapOutcome, SwapResult, find_swap
from svc.version import Format, Target, VersionId

_POLL_S = 0.1
_UNWRITTEN_S = 30.0
"""So long an end that the server knows may be on its way into the journal."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """A change of what a running server serves.

    Attributes:
        server: where it is asked.
    """

    settings: Settings
    registry: Registry
    store: Store
    server: ServerAddress

    @classmethod
    def of(cls, settings: Settings) -> "Promotion":
        """The promotion in one home.

        Raises:
            ServerNotRunningError: nobody would carry it out.
        """
        server = server_address(settings)
        return cls(settings, Registry.of(settings), open_database(settings.home), server)

    def current(self, name: str) -> Desired:
        """What a name shall serve now.

        Raises:
            NotFoundError: the server serves other names.
            ServerNotRunningError: it does not answer.
        """
        served = [model["model"] for model in read_status(self.server)["models"]]
        desired = read_desired(self.store, name) if name in served else None
        if desired is None:
            raise NotFoundError(
                f"{name!r} is not served",
                expected=f"what the server on {self.server.url} serves: {', '.join(served) or 'nothing'}",
                todo=f"svc add {name}",
            )
        return desired

    def served(self, name: str) -> Target | None:
        """What serves under a name until the server has come to what is desired; None where it serves none of it.

        Raises:
            ServerNotRunningError: it does not answer.
        """
        status = self._model_status(name)
        return Target(VersionId.parse(status["version"]), Format(status["format"])) if status else None

    def change(
        self,
        seen: Desired,
        target: Target,
        on_step: Callable[[str], None],
        *,
        forced: str | None = None,
        entry: AuditEntry | None = None,
    ) -> SwapResult:
        """Asks for a version, and returns when the server is done with it, also where it cannot write that down.

        Args:
            on_step: hears each step of the server once.
            forced: why, where the version failed a check.
            entry: of the audit log.

        Raises:
            BusyError: somebody else promoted at the same moment.
            ServerNotRunningError: the server ended meanwhile; it takes the wish up when it starts again.
        """
        wanted = change_desired(self.store, seen, target, previous=seen.target, forced=forced, entry=entry)
        told, unwritten = 0, None
        next_look = time.monotonic() + _UNWRITTEN_S
        while True:
            swap = find_swap(self.store, wanted.name, wanted.generation)
            if swap:
                for step in swap.steps[told:]:
                    on_step(step)
                told = len(swap.steps)
                if swap.result:
                    return swap.result
            else:
                self._refuse_overtaken(wanted)
            self._refuse_without_server(wanted)
            if time.monotonic() >= next_look:
                if unwritten:
                    on_step("the server could not write the end into its journal, see its log; this is what it says")
                    return unwritten
                unwritten = self._told_result(wanted)
                next_look = time.monotonic() + _UNWRITTEN_S
            time.sleep(_POLL_S)

    def _refuse_overtaken(self, wanted: Desired) -> None:
        """The server takes up the newest wish only; one that came between is never begun."""
        last = find_swap(self.store, wanted.name)
        if last and last.generation > wanted.generation:
            raise BusyError(
                f"somebody else promoted {last.target} before the server took up {wanted.target}",
                todo="see `svc status`, then try again",
            )

    def _refuse_without_server(self, wanted: Desired) -> None:
        try:
            server_address(self.settings)
        except ServerNotRunningError as error:
            raise ServerNotRunningError(
                f"the server ended before {wanted.target} served",
                todo=f"start it again, it takes {wanted.target} up: svc serve {wanted.name}",
            ) from error

    def _told_result(self, wanted: Desired) -> SwapResult | None:
        """How a swap ended, as the server's status says it; None where it does not."""
        with suppress(ServerNotRunningError):
            swap = self._model_status(wanted.name).get("last_swap")
            if swap and swap["generation"] == wanted.generation and swap["outcome"]:
                told = {field.name: swap[field.name] for field in fields(SwapResult)}
                kind = SwapKind(told["kind"]) if told["kind"] else None
                return SwapResult(**told | {"outcome": SwapOutcome(told["outcome"]), "kind": kind})
        return None

    def _model_status(self, name: str) -> Mapping[str, Any]:
        return next((model for model in read_status(self.server)["models"] if model["model"] == name), {})
