"""What of the status whoever watches the service may read, and not only who administers it."""

from collections.abc import Mapping
from typing import Any

_FOR_ADMINS = "an admin's key is told why"


def without_inside(status: Mapping[str, Any]) -> dict[str, Any]:
    """Without the process, how engines were started, and texts of errors, which have paths of the machine.

    Args:
        status: as `serving.deployments.Deployments.status` gives it.
    """
    models = [_of_model(model) for model in status.get("models", ())]
    refused = dict.fromkeys(status.get("refused", ()), _FOR_ADMINS)
    return {**status, "models": models, "refused": refused, "pid": None}


def _of_model(model: Mapping[str, Any]) -> dict[str, Any]:
    engine, swap = model["engine"], model["last_swap"]
    return {
        **model,
        "engine": {**engine, "plan": None, "last_error": engine["last_error"] and _FOR_ADMINS},
        "last_swap": swap and {**swap, "reason": swap["reason"] and _FOR_ADMINS},
    }
