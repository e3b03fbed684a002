"""A Ray task that reads the capabilities of a machine of the cluster."""

import os
from pathlib import Path

from svc.engine.device import read_capabilities


def node_capabilities(folder: str) -> str:
    """Return the capabilities of the machine that runs this task, as JSON.

    Args:
        folder: see `RaySettings.folder`.
    """
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the GPUs from a task that reserves none
    place = Path(folder).expanduser()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return read_capabilities(place).model_dump_json()
