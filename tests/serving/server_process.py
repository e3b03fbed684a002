"""Runs `svc serve` as a process, with engine doubles as processes, not vLLM: `server_process.py HOME`."""

import os
import sys
from pathlib import Path

from serving.engines.slots import EngineSlots
from svc import cli
from svc.engine import device as capabilities
from svc.engine.model_facts import ModelFacts
from svc.engine.vllm import launch, process
from svc.engine.vllm.launch import EngineSpec
from svc.registry.registry import Registry
from tests.serving.versions import FACTS, AliasBook
from tests.svc.engine.devices import AVX512


def _command(spec: EngineSpec) -> list[str]:
    return [sys.executable, "-m", "tests.serving.engine_process", str(spec.socket), str(spec.model), spec.served_name]


async def _no_shortage(slots: EngineSlots, engines: object) -> None:
    """Accept all engines, whatever the machine's memory is."""


def main(home: Path) -> None:
    """Serve until the process is stopped."""
    registry = Registry(home / "models", AliasBook())
    replaced: list[tuple[object, str, object]] = [
        (Registry, "of", lambda settings: registry),
        (process, "command", _command),
        (process, "environment", lambda spec: dict(os.environ)),
        (launch, "read_model_facts", lambda folder: ModelFacts()),
        (EngineSlots, "facts", lambda slots, name, folder: FACTS),
        (EngineSlots, "shortage", _no_shortage),
        (capabilities, "read_capabilities", lambda home: AVX512),
    ]
    for where, name, double in replaced:
        setattr(where, name, double)
    sys.argv = ["svc", "--home", str(home), "serve"]
    cli.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
