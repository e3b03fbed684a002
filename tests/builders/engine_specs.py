"""Builds the description of an engine to start, and reads the command that starts it."""

from pathlib import Path
from typing import Any

from svc.engine.vllm.launch import EngineSpec
from svc.settings.engine import Device, EngineSettings
from tests.svc.engine.devices import AVX512


def spec(folder: Path, **settings: Any) -> EngineSpec:
    """Return the description of an engine whose files are in a folder."""
    return EngineSpec(
        model=folder / "model",
        served_name="tuned",
        runtime=folder / "run",
        state=folder / "state",
        log=folder / "engine.log",
        cache=folder / "cache",
        capabilities=AVX512,
        settings=EngineSettings(**{"device": Device.CPU, **settings}),
    )


def option(arguments: list[str], name: str) -> str:
    """Return the value of an option in the arguments of a command."""
    return arguments[arguments.index(name) + 1]
