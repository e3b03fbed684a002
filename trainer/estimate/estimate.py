"""What a recipe takes on each device: memory by part, whether it fits, the largest batch, time and money.

An estimate, not a promise: on this machine's kind memory was within a fifth of what was measured, and time within a
third (docs/estimate.md). A refusal is therefore made from `least_memory`, which no batch and no setting makes smaller.
Training takes one GPU, and so does the estimate: several GPUs help the engine alone, and are not counted.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.estimate.batches import Workload, unshared, with_batch_size
from trainer.estimate.compute import training_seconds
from trainer.estimate.devices import ComputeDevice
from trainer.estimate.memory import Part, Training
from trainer.estimate.model_shape import ModelShape
from trainer.estimate.stages import EnginePart, StageMemory, engine_memory, stage_memory
from trainer.recipe.sections import Recipe

_LARGEST_BATCH = 1024
"""More examples at once than anyone wants."""


@dataclass(frozen=True)
class DeviceEstimate:
    """What a recipe takes on one device.

    Attributes:
        parts: bytes of training at its peak.
        least: bytes without which no step is possible.
        engine: bytes of the engine that serves the merged model, with one sequence of the longest that it takes.
        stages: what each stage takes, training among them.
        largest_batch: examples at once that fit; 0 where not even one does.
        seconds: of the optimizer's run.
        dollars: for them; None where nobody asks for any.
    """

    device: ComputeDevice
    parts: Mapping[Part, float]
    least: float
    engine: Mapping[EnginePart, float]
    stages: tuple[StageMemory, ...]
    largest_batch: int
    seconds: float
    dollars: float | None

    @property
    def memory(self) -> float:
        """Of training, bytes."""
        return sum(self.parts.values())

    @property
    def ram(self) -> float:
        """Bytes of main memory that the largest stage needs on a machine with a GPU; 0 without a GPU."""
        return 0.0 if self.device.cpu else max(one.peak.ram for one in self.stages)

    @property
    def fits(self) -> bool:
        """Whether training does."""
        return self.memory <= self.device.memory

    @property
    def engine_fits(self) -> bool:
        """Whether the engine does."""
        return sum(self.engine.values()) <= self.device.memory


@dataclass(frozen=True)
class Estimate:
    """What a recipe takes.

    Attributes:
        trained: weights that are trained.
        disk: bytes that a run writes, beside the base.
        devices: those that were asked for.
    """

    recipe: Recipe
    shape: ModelShape
    workload: Workload
    trained: int
    disk: float
    devices: tuple[DeviceEstimate, ...]

    @property
    def here(self) -> DeviceEstimate:
        """On this machine, which must be one of the devices."""
        return next(one for one in self.devices if one.device.here)


def estimate_recipe(
    recipe: Recipe, shape: ModelShape, workload: Workload, devices: Sequence[ComputeDevice], served_length: int
) -> Estimate:
    """Return the estimate of a recipe on each device.

    Args:
        served_length: tokens of the longest sequence that an engine takes.
    """
    each = tuple(estimate_device(recipe, shape, workload, device, served_length) for device in devices)
    trained = Training(recipe, shape, devices[0].cpu, devices[0].number_type).trained
    disk = sum(one.peak.disk for one in each[0].stages)  # the same on every device
    return Estimate(recipe, shape, workload, trained, disk, each)


def estimate_device(
    recipe: Recipe, shape: ModelShape, workload: Workload, device: ComputeDevice, served_length: int
) -> DeviceEstimate:
    """Return the estimate of a recipe on one device."""
    training, workload = _on_device(recipe, shape, workload, device)
    seconds = training_seconds(training, workload, device)
    return DeviceEstimate(
        device=device,
        parts=training.memory(workload.largest),
        least=training.least,
        engine=engine_memory(shape, device.number_type, served_length),
        stages=stage_memory(training, workload, device, served_length),
        largest_batch=_largest_batch(training, workload, device.memory),
        seconds=seconds,
        dollars=None if device.dollars is None else device.dollars * seconds / 3600,
    )


def memory_on(recipe: Recipe, shape: ModelShape, workload: Workload, device: ComputeDevice) -> float:
    """Return the bytes of training alone."""
    training, workload = _on_device(recipe, shape, workload, device)
    return training.peak(workload.largest)


def _on_device(
    recipe: Recipe, shape: ModelShape, workload: Workload, device: ComputeDevice
) -> tuple[Training, Workload]:
    """Return the training, and the batches as they go through the model there."""
    training = Training(recipe, shape, device.cpu, device.number_type)
    return training, workload if training.shares_prompts else unshared(workload)


def _largest_batch(training: Training, workload: Workload, memory: float) -> int:
    """Return how many examples as long as the longest fit at once; 0 if not even one does."""
    sizes = range(1, _LARGEST_BATCH + 1)
    return bisect_right(sizes, memory, key=lambda size: training.peak(with_batch_size(workload, size).largest))
