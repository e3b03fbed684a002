"""Estimates what training with a recipe takes on each device: a breakdown of the memory, whether it fits, the largest
batch size, time and cost.

Estimated memory differed from the measured memory by at most a fifth. Estimated time usually differed from the
measured time by at most a third; larger differences were more frequent with AMX (docs/estimate.md). A run is therefore
rejected only if its weights, gradients and optimizer state alone (`least`) exceed the available memory. With several
GPUs, memory is given per GPU.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trainer.estimate.batches import Batch, Workload, shared_out, unshared
from trainer.estimate.compute import training_seconds
from trainer.estimate.devices import HERE, ComputeDevice
from trainer.estimate.memory import Part, Training
from trainer.estimate.model_shape import ModelShape
from trainer.estimate.stages import EnginePart, StageMemory, engine_memory, stage_memory
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import Sharding
from trainer.training.parallel.devices import divide_step, find_undivided

_MAX_BATCH = 1024
"""Largest batch size that an estimate considers."""


@dataclass(frozen=True)
class DeviceEstimate:
    """Estimated memory, time and cost of training with a recipe on one device.

    Attributes:
        parts: peak training memory in bytes, keyed by what it is used for.
        least: minimum bytes that a training step needs, whatever the batch.
        engine: bytes that an engine needs to serve the merged model with one sequence of maximum length, keyed by what
            they are used for.
        stages: memory and disk space that each stage needs, including training.
        largest_batch: largest batch size that fits on each device, or 0 if not even one example fits.
        seconds: time from the first training step to the last.
        dollars: price of `seconds` of training on all devices, or None if the device has no price.
        checkpointing: whether gradient checkpointing is enabled.
        sharded: whether the weights are sharded across several devices.
        undivided: reason why the weights cannot be sharded across devices, or None if they can.
    """

    device: ComputeDevice
    parts: Mapping[Part, float]
    least: float
    engine: Mapping[EnginePart, float]
    stages: tuple[StageMemory, ...]
    largest_batch: int
    seconds: float
    dollars: float | None
    checkpointing: bool
    sharded: bool = False
    undivided: str | None = None

    @property
    def memory(self) -> float:
        """Peak memory of training, in bytes."""
        return sum(self.parts.values())

    @property
    def ram(self) -> float:
        """Main memory in bytes that the most demanding stage needs in addition to GPU memory. It is 0 without a GPU."""
        return 0.0 if self.device.cpu else max(stage.peak.ram for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether training fits into the device's memory."""
        return self.memory <= self.device.memory

    @property
    def engine_fits(self) -> bool:
        """Whether the engine fits into the device's memory."""
        return sum(self.engine.values()) <= self.device.memory


@dataclass(frozen=True)
class Estimate:
    """Estimated memory and time needed to run a recipe on each of several devices.

    Attributes:
        trained: number of trained weights.
        disk: bytes that a run writes, not counting the base.
        devices: estimates for the requested devices.
    """

    recipe: Recipe
    shape: ModelShape
    workload: Workload
    trained: int
    disk: float
    devices: tuple[DeviceEstimate, ...]

    @property
    def here(self) -> DeviceEstimate:
        """The estimate for this machine, which must be among the devices."""
        return next(estimate for estimate in self.devices if estimate.device.name == HERE)


def estimate_recipe(
    recipe: Recipe, shape: ModelShape, workload: Workload, devices: Sequence[ComputeDevice], served_length: int
) -> Estimate:
    """Estimate how much memory, disk space, time and money a recipe needs on each of the given devices.

    Args:
        served_length: maximum sequence length in the engine, in tokens.
    """
    estimates = tuple(estimate_device(recipe, shape, workload, device, served_length) for device in devices)
    trained = Training(recipe, shape, devices[0].cpu, devices[0].number_type).trained
    disk = sum(stage.peak.disk for stage in estimates[0].stages)  # the same on every device
    return Estimate(recipe, shape, workload, trained, disk, estimates)


def estimate_device(
    recipe: Recipe, shape: ModelShape, workload: Workload, device: ComputeDevice, served_length: int
) -> DeviceEstimate:
    """Estimate a recipe's memory, disk space, time and cost on one device, or on several identical devices.

    Raises:
        RecipeError: a step cannot be divided among the devices.
    """
    recipe, workload = shared_out(recipe, workload, device.count)
    training = _training(recipe, shape, device, workload.largest)
    workload = workload if training.shares_prompts else unshared(workload)
    seconds = training_seconds(training, workload, device)
    return DeviceEstimate(
        device=device,
        parts=training.memory(workload.largest),
        least=training.least,
        engine=engine_memory(shape, device.number_type, served_length),
        stages=stage_memory(training, workload, device, served_length),
        largest_batch=_largest_batch(training, workload, device.memory),
        seconds=seconds,
        dollars=None if device.dollars is None else device.count * device.dollars * seconds / 3600,
        checkpointing=training.checkpointing,
        sharded=training.sharded,
        undivided=find_undivided(recipe, device.number_type, experts=bool(shape.experts)),
    )


def _training(recipe: Recipe, shape: ModelShape, device: ComputeDevice, largest: Batch) -> Training:
    """Return the training setup for a recipe on one or several devices. The weights are sharded across the devices if
    the recipe says so or, by default, if all weights and the largest batch do not fit on one device.

    Args:
        recipe: recipe with the batch size per device.
    """
    copy = Training(recipe, shape, device.cpu, device.number_type, device.count)
    asked = recipe.train.sharding
    if device.count == 1 or asked is Sharding.NEVER:
        return copy
    if find_undivided(recipe, device.number_type, experts=bool(shape.experts)):
        return copy
    if asked is Sharding.AUTO and _peak(copy, largest) <= device.memory:
        return copy
    return replace(copy, sharded=True)


def _peak(training: Training, batch: Batch) -> float:
    return training.peak(batch if training.shares_prompts else replace(batch, shared=0))


def memory_on(recipe: Recipe, shape: ModelShape, batch: Batch, device: ComputeDevice) -> float:
    """Return the peak memory of training with the given batch, in bytes. Other stages are not included.

    Args:
        batch: a batch of the recipe's full batch size. With several devices, each computes a part of it.
    """
    if share := divide_step(recipe.train, device.count):
        batch = batch.resized(math.ceil(batch.rows * share.batch_size / recipe.train.batch_size))
    return _peak(_training(recipe, shape, device, batch), batch)


def _largest_batch(training: Training, workload: Workload, memory: float) -> int:
    """Return the largest batch size that fits if every example is as long as the longest example. Return 0 if not even
    a single example fits.
    """
    sizes = range(1, _MAX_BATCH + 1)
    return bisect_right(sizes, memory, key=lambda size: training.peak(workload.largest.resized(size)))
