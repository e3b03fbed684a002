"""The client side of `svc add` and `svc remove`: changes the set of served models, and waits for the server."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine as Store

from serving.rollout.initial_state import choose_desired
from svc.engine.state import EngineState
from svc.errors import NotFoundError, RefusedError
from svc.registry.registry import Registry
from svc.remote.server_url import ServerAddress, read_status, server_address
from svc.settings import Settings
from svc.store.database import open_database
from svc.store.deployments import add_deployment, deployed_names, remove_deployment
from svc.terminal import waiting
from svc.version import Format, Target

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Membership:
    """The set of models that a running server serves."""

    registry: Registry
    store: Store
    server: ServerAddress

    @classmethod
    def of(cls, settings: Settings) -> "Membership":
        """Return the set of models of the server that uses a home.

        Raises:
            ServerNotRunningError: no server uses the home.
        """
        server = server_address(settings)
        return cls(Registry.of(settings), open_database(settings.home), server)

    def add(self, model: str, format: Format | None) -> Target:
        """Add a model and wait until it is served.

        Args:
            model: NAME, NAME@N or NAME@alias.
            format: None for the format that was served last, else GPTQ if the version has it.

        Raises:
            RefusedError: the model is served already, or cannot be served.
            NotFoundError: no such model, version or format.
            ServerNotRunningError: the server has stopped; it will serve the model after its next start.
        """
        name = model.partition("@")[0]
        if name in deployed_names(self.store):
            raise RefusedError(f"{name} is already served", todo=f"switch to another version: svc promote {name}@N")
        target = choose_desired(self.registry, self.store, model, format).target
        add_deployment(self.store, name)
        with waiting(f"starting {target}"):
            while True:
                status = read_status(self.server)
                # While the model is in the set, the reason is from an earlier attempt.
                if (why := status["refused"].get(name)) and name not in deployed_names(self.store):
                    raise RefusedError(f"{target} is not served\n  why: {why}")
                if _model(status, name).get("engine", {}).get("state") == EngineState.READY:
                    return target
                time.sleep(_POLL_S)

    def remove(self, name: str) -> None:
        """Remove a model and wait until its engines have stopped.

        Raises:
            NotFoundError: the model is not served.
            ServerNotRunningError: the server has stopped; it will not serve the model after its next start.
        """
        if not remove_deployment(self.store, name):
            served = ", ".join(deployed_names(self.store)) or "none"
            raise NotFoundError(f"{name!r} is not served", expected=f"a served model: {served}")
        with waiting(f"stopping {name}"):
            while _model(read_status(self.server), name):
                time.sleep(_POLL_S)


def _model(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next((model for model in status["models"] if model["model"] == name), {})
