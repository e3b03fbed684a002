"""The client side of `svc add` and `svc remove`: changes the set of served models and waits for the result."""

import time
from collections.abc import Mapping
from typing import Any

from serving.rollout.initial_state import choose_desired
from svc.engine.state import EngineState
from svc.errors import NotFoundError, RefusedError
from svc.registry.registry import Registry
from svc.remote.server_url import read_status, server_address
from svc.settings.settings import Settings
from svc.store.database import open_store
from svc.store.deployments import add_deployment, deployed_names, remove_deployment
from svc.terminal import waiting
from svc.version import Format, Target

_POLL_S = 0.2


def add_model(settings: Settings, model: str, format: Format | None) -> Target:
    """Add a model to the server that uses a tuneserve home folder, and wait until the model is served.

    Args:
        model: NAME, NAME@N or NAME@alias.
        format: the format to serve; None selects the format that was served last or, failing that, GPTQ if the version
            has that format.

    Raises:
        RefusedError: the model is already being served, or cannot be served.
        NotFoundError: there is no such model, version or format.
        ServerNotRunningError: no server uses the home folder, or the server has stopped. If it has stopped, it
            will serve the model the next time it starts.
    """
    server, name = server_address(settings), model.partition("@")[0]
    registry, store = Registry.of(settings), open_store(settings)
    if name in deployed_names(store):
        raise RefusedError(f"{name} is already served", todo=f"switch to another version: svc promote {name}@N")
    target = choose_desired(registry, store, model, format).target
    earlier = read_status(server)["refused"].get(name)
    add_deployment(store, name)
    with waiting(f"starting {target}"):
        while True:
            status = read_status(server)
            # The model stays in the set if another server serves it.
            why = status["refused"].get(name)
            if why and (why != earlier or name not in deployed_names(store)):
                raise RefusedError(f"{target} could not be served\n  why: {why}")
            if _model(status, name).get("engine", {}).get("state") == EngineState.READY:
                return target
            time.sleep(_POLL_S)


def remove_model(settings: Settings, name: str) -> None:
    """Remove a model from the server that uses a tuneserve home folder, and wait until its engines have stopped.

    Raises:
        NotFoundError: the model is not served.
        ServerNotRunningError: no server uses the home folder, or the server has stopped. If it has stopped, it
            will not serve the model the next time it starts.
    """
    server, store = server_address(settings), open_store(settings)
    if not remove_deployment(store, name):
        served = ", ".join(deployed_names(store)) or "none"
        raise NotFoundError(f"{name!r} is not served", expected=f"a served model: {served}")
    with waiting(f"stopping {name}"):
        while _model(read_status(server), name):
            time.sleep(_POLL_S)


def _model(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next((model for model in status["models"] if model["model"] == name), {})
