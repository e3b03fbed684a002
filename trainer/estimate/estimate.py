"""What a recipe takes on each device: memory by part, whether it fits, the largest batch, time and money.

An estimate, not a promise: on this machine's kind memory was within a fifth of what was measured, and time within a
third (docs/estimate.md). A refusal is therefore made from `least_memory`, which no batch and no setting makes smaller.
Training takes one GPU, and so does the estimate: several GPUs help the engine alone, and are not counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from svc.engine.capabilities import NumberType
from svc.engine.vllm.headroom import ENGINE_OVERHEAD
from trainer.estimate.batches import Workload, unshared, with_batch_size
from trainer.estimate.compute import training_time
from trainer.estimate.devices import ComputeDevice
from trainer.estimate.memory import Part, Setup, least_memory, trained_weights, training_memory
from trainer.estimate.model_shape import ModelShape
from trainer.estimate.stages import StageMemory, key_value_bytes, stage_memory
from trainer.recipe.sections import Recipe

_LARGEST_BATCH = 1024
"""More examples at once than anyone wants."""


class EnginePart(StrEnum):
    """What the engine takes memory for."""

    WEIGHTS = "weights"
    KEYS = "keys and values"
    RUNTIME = "runtime"


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
    def here(self) -> DeviceEstimate | None:
        """On this machine; None where nobody asked for that."""
        return next((one for one in self.devices if one.device.here), None)


def estimate_recipe(
    recipe: Recipe, shape: ModelShape, workload: Workload, devices: Sequence[ComputeDevice], served_length: int
) -> Estimate:
    """Of a recipe on each device.

    Args:
        served_length: tokens of the longest sequence that an engine takes.
    """
    each = tuple(estimate_device(recipe, shape, workload, device, served_length) for device in devices)
    trained = trained_weights(shape, recipe)
    disk = sum(one.peak.disk for one in each[0].stages)  # the same on every device
    return Estimate(recipe, shape, workload, trained, disk, each)


def estimate_device(
    recipe: Recipe, shape: ModelShape, workload: Workload, device: ComputeDevice, served_length: int
) -> DeviceEstimate:
    """Of a recipe on one device."""
    setup = Setup.of(recipe, device.number_type, cpu=device.cpu)
    fitted = workload if setup.shares_prompts(recipe, shape) else unshared(workload)
    time = training_time(shape, recipe, fitted, setup, device)
    return DeviceEstimate(
        device=device,
        parts=training_memory(shape, recipe, fitted.largest, setup),
        least=least_memory(shape, recipe, setup),
        engine=engine_memory(shape, device, served_length),
        stages=stage_memory(recipe, shape, fitted, device, served_length),
        largest_batch=largest_batch(recipe, shape, fitted, device),
        seconds=time.seconds,
        dollars=None if device.dollars is None else device.dollars * time.seconds / 3600,
    )


def memory_on(recipe: Recipe, shape: ModelShape, workload: Workload, device: ComputeDevice) -> float:
    """Bytes of training alone."""
    setup = Setup.of(recipe, device.number_type, cpu=device.cpu)
    fitted = workload if setup.shares_prompts(recipe, shape) else unshared(workload)
    return sum(training_memory(shape, recipe, fitted.largest, setup).values())


def largest_batch(recipe: Recipe, shape: ModelShape, workload: Workload, device: ComputeDevice) -> int:
    """Examples as long as the longest that fit at once; 0 where not even one does."""

    def fits(size: int) -> bool:
        return memory_on(recipe, shape, with_batch_size(workload, size), device) <= device.memory

    if not fits(1):
        return 0
    low, high = 1, _LARGEST_BATCH + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def engine_memory(shape: ModelShape, device: ComputeDevice, served_length: int) -> dict[EnginePart, float]:
    """Of an engine with the merged weights, as svc.engine.vllm.headroom counts it before a start."""
    size = 4 if device.number_type is NumberType.FLOAT32 else 2
    return {
        EnginePart.WEIGHTS: size * shape.parameters,
        EnginePart.KEYS: key_value_bytes(shape, device.number_type, served_length),
        EnginePart.RUNTIME: ENGINE_OVERHEAD,
    }
