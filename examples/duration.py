"""Estimate the duration of the demo on this machine from two measurements of a few seconds.

About half of the time is matrix products, and most of the rest is the start of processes, each of which loads torch and
other libraries. Both are measured here and compared with a machine of two cores with AVX-512 on which a complete demo
took 10.9 minutes; its log shows how much of this was computation. The estimate ignores the progress of an interrupted
demo and the download of packages and the base model.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from svc.child_process import in_child_process
from svc.engine.device import NumberType, read_capabilities
from trainer.estimate.devices import measure_matrix_speed

_TOKENS, _WIDTH, _HEIGHT = 1_000, 576, 1_536
"""Number of tokens in a batch of the example task, and the shape of its model's largest layer."""
_PRODUCTS = 1.35e14
"""Number of floating-point operations that, in products of that shape, take as long as all computation of the demo."""
_IMPORTS = 250.0
"""Number of imports of torch that take as long as the rest of the demo."""


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """Measurements of a machine.

    Attributes:
        number_type: number type of training on this machine.
        speed: floating-point operations per second in a layer's product and its gradients.
        import_s: seconds to import torch in a new process.
    """

    number_type: NumberType
    speed: float
    import_s: float

    @property
    def demo_minutes(self) -> float:
        """Return the estimated minutes from the first command to the summary."""
        return (_IMPORTS * self.import_s + _PRODUCTS / self.speed) / 60


def measure_machine(home: Path) -> MachineSpeed:
    """Measure this machine.

    Args:
        home: home in which the capabilities of the device are cached.
    """
    number_type = read_capabilities(home).training_type
    speed, import_s = in_child_process(_measure, number_type)
    return MachineSpeed(number_type, speed, import_s)


def _measure(number_type: NumberType) -> tuple[float, float]:
    started = time.perf_counter()
    import torch  # noqa: F401 - the import is measured

    import_s = time.perf_counter() - started
    return measure_matrix_speed(_TOKENS, _WIDTH, _HEIGHT, number_type, repeats=100), import_s
