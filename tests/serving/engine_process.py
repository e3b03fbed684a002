"""Runs an engine double as a process that outlives the server: `engine_process.py SOCKET FOLDER NAME`."""

import sys
from pathlib import Path

import uvicorn

from tests.serving.engine_double import EngineDouble


def main(socket: str, weights: str, name: str) -> None:
    """Serve until the process is stopped."""
    double = EngineDouble(
        weights=weights, name=name, token_delay_s=0.002, label=lambda folder: Path(folder).parent.name
    )
    uvicorn.run(double, uds=socket, log_level="critical", lifespan="off")


if __name__ == "__main__":
    main(*sys.argv[1:])
