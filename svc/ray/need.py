"""Resources that one process reserves on a machine of a Ray cluster: an engine, or a worker that trains."""

from collections.abc import Mapping
from dataclasses import dataclass

_SOME = 0.001
"""Amount of the resource `accelerator_type:TYPE` to reserve. A machine has one unit of this resource, regardless of how
many GPUs of the type it has."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Need:
    """Resources that one process reserves on a machine.

    Attributes:
        cpus: number of CPU cores.
        gpus: number of GPUs.
        gpu_type: Ray's name for the GPU type, such as `H100`, or None for any.
    """

    cpus: float = 0
    gpus: int = 0
    gpu_type: str | None = None

    @property
    def resources(self) -> dict[str, float]:
        """The resources, keyed by Ray's names for them."""
        amounts = {"CPU": float(self.cpus), "GPU": float(self.gpus)}
        if self.gpu_type:
            amounts[f"accelerator_type:{self.gpu_type}"] = _SOME
        return {name: amount for name, amount in amounts.items() if amount}

    def count_in(self, resources: Mapping[str, float]) -> int:
        """Return how many such processes fit into resources, which are keyed by Ray's names for them."""
        return int(min((resources.get(name, 0) + _ROUNDING) // amount for name, amount in self.resources.items()))

    def __str__(self) -> str:
        amounts = {"CPU": self.cpus, f"GPU ({self.gpu_type})" if self.gpu_type else "GPU": self.gpus}
        return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount)
