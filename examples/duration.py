"""Estimates how long the demo takes on this machine, from two measurements of a few seconds each.

About half of the time is spent on matrix products, and most of the rest on starting processes, each of
which loads torch and other libraries. Both are measured here and compared with a machine with two cores
and AVX-512, on which a complete demo took 10.9 minutes; its log shows how much of this was computation.
The estimate ignores the progress of an interrupted demo and the download of packages and the base model.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from svc.child_process import in_child_process
from svc.engine.device import NumberType, read_capabilities
from trainer.estimate.devices import measure_matrix_speed

_TOKENS, _WIDTH, _HEIGHT = 1_000, 576, 1_536
"""Number of tokens in a batch of the example task, and the shape of the largest layer in its model."""
_PRODUCTS = 1.35e14
"""Number of floating-point operations that, in such products, take as long as all computation in the demo."""
_IMPORTS = 250.0
"""Number of torch imports that take as long as the rest of the demo."""


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """Speed measurements of a machine.

    Attributes:
        number_type: data type used for training on this machine.
        speed: floating-point operations per second for a layer's product and its gradients.
        import_s: seconds to import torch in a new process.
    """

    number_type: NumberType
    speed: float
    import_s: float

    @property
    def demo_minutes(self) -> float:
        """Return the estimated time from the first command to the summary, in minutes."""
        return (_IMPORTS * self.import_s + _PRODUCTS / self.speed) / 60


def measure_machine(home: Path) -> MachineSpeed:
    """Measure this machine's computation and import speed.

    Args:
        home: home in which the device's capabilities are cached.
    """
    number_type = read_capabilities(home).training_type
    speed, import_s = in_child_process(_measure, number_type)
    return MachineSpeed(number_type, speed, import_s)


def _measure(number_type: NumberType) -> tuple[float, float]:
    started = time.perf_counter()
    import torch  # noqa: F401 - the import is measured

    import_s = time.perf_counter() - started
    return measure_matrix_speed(_TOKENS, _WIDTH, _HEIGHT, number_type, repeats=100), import_s
