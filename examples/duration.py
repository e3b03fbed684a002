"""How long the demo takes on this machine, from two measurements of some seconds.

About half of the time is products of matrices, and most of the rest is processes that start: each loads torch, and much
else. Both are measured here and compared with a machine of two cores with AVX-512 on which a whole demo took 10.9
minutes; how those divide was added up from its log. Knows nothing of what an earlier, interrupted demo has done
already, nor of how fast packages and the base model come over the network.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from svc.child_process import in_child_process
from svc.engine.device import NumberType, read_capabilities
from trainer.estimate.devices import measure_matrix_speed

_TOKENS, _WIDTH, _HEIGHT = 1_000, 576, 1_536
"""A batch of the example task, and the largest layer of its model."""
_PRODUCTS = 1.35e14
"""Floating-point operations, in products of that shape, that take as long as all that is computed."""
_IMPORTS = 250.0
"""Imports of torch that take as long as all the rest."""


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """What was measured.

    Attributes:
        number_type: in which this machine trains.
        speed: of a layer's product and its gradients, floating-point operations a second.
        import_s: for torch, in a new process.
    """

    number_type: NumberType
    speed: float
    import_s: float

    @property
    def demo_minutes(self) -> float:
        """From the first command to the summary."""
        return (_IMPORTS * self.import_s + _PRODUCTS / self.speed) / 60


def measure_machine(home: Path) -> MachineSpeed:
    """Measures this machine.

    Args:
        home: keeps what torch and vLLM say of the device.
    """
    number_type = read_capabilities(home).training_type
    speed, import_s = in_child_process(_measure, number_type)
    return MachineSpeed(number_type, speed, import_s)


def _measure(number_type: NumberType) -> tuple[float, float]:
    started = time.perf_counter()
    import torch  # noqa: F401 - how long that takes is what is measured

    import_s = time.perf_counter() - started
    return measure_matrix_speed(_TOKENS, _WIDTH, _HEIGHT, number_type, repeats=100), import_s
