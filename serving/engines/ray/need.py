"""Resources that an engine reserves on a machine of a Ray cluster."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

_ROUNDING = 1e-9


class Need(BaseModel):
    """Resources that one engine needs, keyed by Ray's resource names, such as `GPU` and `CPU`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resources: dict[str, float]

    def __hash__(self) -> int:
        return hash(frozenset(self.resources.items()))

    def fits(self, has: Mapping[str, float]) -> bool:
        """Return whether an engine fits on a machine with these resources."""
        return all(has.get(name, 0.0) >= amount - _ROUNDING for name, amount in self.resources.items())

    def __str__(self) -> str:
        return " and ".join(f"{amount:g} {name}" for name, amount in self.resources.items())


def count_fitting(needs: Sequence[Need], free: Sequence[Mapping[str, float]]) -> int:
    """Return how many of the engines fit on a cluster's machines at the same time.

    The largest engines are placed first, each on the machine with the fewest free resources among those where it fits.
    If the engines' sizes divide each other, as 1, 2, 4 and 8 GPUs do, this places all engines whenever that is
    possible.

    Args:
        free: free resources of each machine.
    """
    left = [dict(machine) for machine in free]
    fitting = 0
    for need in sorted(needs, key=lambda need: max(need.resources.values()), reverse=True):
        machines = [machine for machine in left if need.fits(machine)]
        if machines:
            machine = min(machines, key=lambda machine: [machine[name] for name in need.resources])
            for name, amount in need.resources.items():
                machine[name] -= amount
            fitting += 1
    return fitting
