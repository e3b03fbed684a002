"""Trains models in one or several processes, and compares the results."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from svc.engine.device import NumberType
from trainer.recipe.recipe import Recipe
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.parallel.device_processes import DeviceProcesses
from trainer.training.parallel.devices import TrainingDevice
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData, TrainingSummary

CLOSE = 1e-5
"""Maximum difference in float32 between losses of one device and of two."""
CLOSE_WEIGHTS = 1e-4
"""Maximum difference in float32 between weights: a hundredth of a step of Adam, in which the sign of a gradient near 0
may differ."""


def train(
    base: Path,
    data: TrainingData,
    recipe: Recipe,
    folder: Path,
    processes: int,
    number_type: NumberType = NumberType.FLOAT32,
    **options: Any,
) -> TrainingSummary:
    """Train on the CPU in one or several processes."""
    devices = (TrainingDevice("the CPU"),) * processes
    options["processes"] = DeviceProcesses(devices) if processes > 1 else None
    out, checkpoints = folder / "trained", folder / "checkpoints"
    return train_model(base, data, recipe, out, checkpoints, number_type=number_type, **options)


def heldout_of(summary: TrainingSummary) -> list[float]:
    """Return the held-out losses of a run."""
    return [point.heldout_loss for point in summary.points if point.heldout_loss is not None]


def difference(first: Path, second: Path) -> float:
    """Return the largest difference between two trained models, after checking that they have the same files."""
    names = sorted(path.name for path in (first / "trained").iterdir())
    assert names == sorted(path.name for path in (second / "trained").iterdir())
    (name,) = (name for name in names if name.endswith(".safetensors"))
    one, two = load_file(first / "trained" / name), load_file(second / "trained" / name)
    assert {key: weight.dtype for key, weight in one.items()} == {key: weight.dtype for key, weight in two.items()}
    return max(float((one[key].float() - two[key].float()).abs().max()) for key in one)


def weights(folder: Path) -> bytes:
    """Return the content of the file of trained weights."""
    return next((folder / "trained").glob("*.safetensors")).read_bytes()


def at_checkpoint(folder: Path, step: int, act: Callable[[], None]) -> threading.Thread:
    """Act in a thread as soon as the checkpoint of a step exists."""

    def watch() -> None:
        while not CheckpointFolder(folder / "checkpoints", 2).at(step).exists():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread
