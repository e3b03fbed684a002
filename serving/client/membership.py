"""The client's side of which models a server serves: change the set, then follow what the server does about it."""

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
    """The set of models of a running server.

    Attributes:
        server: where it is asked.
    """

    registry: Registry
    store: Store
    server: ServerAddress

    @classmethod
    def of(cls, settings: Settings) -> "Membership":
        """The set of one home.

        Raises:
            ServerNotRunningError: nobody would change it.
        """
        server = server_address(settings)
        return cls(Registry.of(settings), open_database(settings.home), server)

    def add(self, model: str, format: Format | None) -> Target:
        """Returns when the model is served.

        Args:
            model: NAME, NAME@N or NAME@alias.
            format: None for what served last, else GPTQ where the version has it.

        Raises:
            RefusedError: it is served already, or the server cannot serve it; says why.
            NotFoundError: no such model, version or format.
            ServerNotRunningError: the server has ended, and takes it up at its next start.
        """
        name = model.partition("@")[0]
        if name in deployed_names(self.store):
            raise RefusedError(f"{name} is served already", todo=f"bring another version: svc promote {name}@N")
        target = choose_desired(self.registry, self.store, model, format).target
        add_deployment(self.store, name)
        with waiting(f"starting {target}"):
            while True:
                status = read_status(self.server)
                # While it is in the set, the reason is that of an earlier attempt.
                if (why := status["refused"].get(name)) and name not in deployed_names(self.store):
                    raise RefusedError(f"{target} is not served\n  why: {why}")
                if _model(status, name).get("engine", {}).get("state") == EngineState.READY:
                    return target
                time.sleep(_POLL_S)

    def remove(self, name: str) -> None:
        """Returns when the model's engines have ended.

        Raises:
            NotFoundError: it is not served.
            ServerNotRunningError: the server has ended; its next start comes without the model.
        """
        if not remove_deployment(self.store, name):
            served = ", ".join(deployed_names(self.store)) or "nothing"
            raise NotFoundError(f"{name!r} is not served", expected=f"what is served: {served}")
        with waiting(f"ending {name}"):
            while _model(read_status(self.server), name):
                time.sleep(_POLL_S)


def _model(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next((model for model in status["models"] if model["model"] == name), {})
