"""Tests processes that share their work although each is on a machine with its own files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from svc.errors import TrainingError
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.parallel.device_group import DeviceGroup, GroupCheckpoints
from trainer.training.parallel.device_processes import run_on_devices
from trainer.training.parallel.devices import TrainingDevice
from trainer.training.parallel.processes import Place
from trainer.training.trainer import ResumableTrainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]

DEVICES = (TrainingDevice("the CPU"),) * 2
WEIGHTS = torch.arange(10.0).reshape(5, 2)


def write_checkpoint(machine: Path, step: int) -> None:
    with CheckpointFolder(machine, 2).writing(step) as folder:
        save_file({"weight": WEIGHTS}, folder / "weights.safetensors")


def load_best(place: Place, machines: Path, sharded: bool) -> list[list[float]]:
    """Return this process's weights after it has loaded the best ones, which only the first machine has."""
    with DeviceGroup.joined(place, sharded=sharded) as group:
        weight: Any = torch.nn.Parameter(torch.zeros(5, 2))
        if sharded:
            weight = distribute_tensor(torch.zeros(5, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
        checkpoints = GroupCheckpoints(group, machines / str(place.rank), 2)

        def load_weights(folder: Path) -> None:
            assert folder.is_dir()
            weight.data.copy_(WEIGHTS)

        trainer: Any = SimpleNamespace(
            group=group, checkpoints=checkpoints, _trained=lambda: {"weight": weight}, load_weights=load_weights
        )
        ResumableTrainer.load_best(trainer, 4)
        loaded: list[list[float]] = (weight.to_local() if sharded else weight.detach()).tolist()
        return loaded


def find_newest(place: Place, machines: Path) -> str:
    with DeviceGroup.joined(place) as group:
        newest = GroupCheckpoints(group, machines / str(place.rank), 2).newest()
        return newest.name if newest else "none"


def test_each_device_gets_its_shard_of_the_best_weights_when_only_the_first_device_has_the_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "0", 4)
    first, second = run_on_devices(DEVICES, load_best, (tmp_path, True), {})
    assert first + second == WEIGHTS.tolist()


def test_first_process_loads_the_best_weights_when_other_processes_lack_the_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "0", 4)
    first, _ = run_on_devices(DEVICES, load_best, (tmp_path, False), {})
    assert first == WEIGHTS.tolist()


def test_processes_with_different_newest_checkpoints_refuse_to_continue(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "0", 4)
    write_checkpoint(tmp_path / "1", 6)
    with pytest.raises(TrainingError, match="disagree on the newest checkpoint: step-00000004, step-00000006"):
        run_on_devices(DEVICES, find_newest, (tmp_path,), {})
