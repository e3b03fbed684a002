"""Published models by their config.json alone, and devices."""

from functools import cache
from pathlib import Path

from svc.engine.capabilities import NumberType
from trainer.estimate.devices import CPU_UTILIZATION, ComputeDevice
from trainer.estimate.model_shape import ModelShape, read_model_shape
from trainer.recipe.targets import Targets

FOLDER = Path(__file__).with_name("configs")


@cache
def published(name: str, preset: Targets = Targets.ALL_LINEAR) -> ModelShape:
    """A published model's shape."""
    return read_model_shape(FOLDER / name, preset)


def cpu_device(memory: float = 16e9, number_type: NumberType = NumberType.BFLOAT16) -> ComputeDevice:
    """A machine without a GPU."""
    utilization = CPU_UTILIZATION[number_type]
    return ComputeDevice("here", "this machine", True, number_type, memory, 3e11, 1e10, utilization, here=True)
