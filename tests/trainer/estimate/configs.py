"""Published models as config.json files, and devices to estimate them on."""

from functools import cache
from pathlib import Path

from svc.engine.device import NumberType
from trainer.estimate.batches import Batch, Workload
from trainer.estimate.devices import CPU_UTILIZATION, HERE, ComputeDevice
from trainer.estimate.model_shape import ModelShape, read_model_shape
from trainer.recipe.recipe import Recipe
from trainer.recipe.targets import Targets

FOLDER = Path(__file__).with_name("configs")


@cache
def published(name: str, preset: Targets = Targets.ALL_LINEAR) -> ModelShape:
    """Return the shape of a published model."""
    return read_model_shape(FOLDER / name, preset)


def cpu_device(memory: float = 16e9, number_type: NumberType = NumberType.BFLOAT16) -> ComputeDevice:
    """Return a compute device for a machine without a GPU."""
    utilization = CPU_UTILIZATION[number_type]
    return ComputeDevice(HERE, "this machine", True, number_type, memory, 3e11, 1e10, utilization)


def even_workload(
    examples: int, length: int, recipe: Recipe, *, answers: int | None = None, shared: int = 0
) -> Workload:
    """Return the workload of a run on examples of equal length, as in published figures.

    Args:
        answers: number of tokens learned per example; all by default.
    """
    train = recipe.train
    size = min(train.batch_size, examples)
    batch = Batch(size, length, shared, size * (answers or length))
    repeats = train.steps * train.gradient_accumulation if train.steps else train.epochs * examples / size
    return Workload(examples, length, examples * length, (batch,), repeats, batch, counted=True)
