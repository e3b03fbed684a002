"""Whether a training is refused before it begins: only what cannot be, by what no batch makes smaller.

A wrong refusal is worse than none. So what is needed at least is compared with all memory that the machine may ever
use, not with what is free now.
"""

import shutil
from pathlib import Path

from svc.engine.machine import Machine
from svc.errors import DiskSpaceError, InsufficientMemoryError
from trainer.estimate.advice import advise, as_text
from trainer.estimate.estimate import Estimate, least_disk

_ANYWAY = "--anyway tries all the same"


def refuse_memory(estimate: Estimate, machine: Machine) -> None:
    """Raises where training does not fit into memory.

    Raises:
        InsufficientMemoryError: by how much, and what to change.
    """
    if (here := estimate.here) is None:
        return
    whole = float(machine.memory if here.device.cpu or not machine.gpus else machine.gpus[0].memory)
    if here.least > whole:
        changes = advise(estimate.recipe, estimate.shape, estimate.workload, here.device)
        todo = f"set {as_text(changes)}" if changes else "take a smaller base, or another machine: see `svc estimate`"
        raise InsufficientMemoryError(
            f"weights, gradients and the optimizer's state take {here.least / 1e9:.1f} GB at least, and "
            f"{here.device.label} has {whole / 1e9:.1f} GB: {(here.least - whole) / 1e9:.1f} GB too few",
            expected="room for them, whatever the batch",
            todo=f"{todo}; {_ANYWAY}",
        )


def refuse_disk(estimate: Estimate, home: Path) -> None:
    """Raises where a version does not fit on the disk.

    Args:
        home: on the disk that a run writes to.

    Raises:
        DiskSpaceError: by how much.
    """
    if any((home / "runs").glob(f"{estimate.recipe.name}-*")):
        return  # what an earlier try has written is not written again
    folder = next(above for above in (home, *home.absolute().parents) if above.exists())
    free, need = shutil.disk_usage(folder).free, least_disk(estimate.recipe, estimate.shape)
    if need > free:
        raise DiskSpaceError(
            f"the run writes {need / 1e9:.1f} GB at least in {home}, {free / 1e9:.1f} GB are free",
            todo=f"free {(need - free) / 1e9:.1f} GB or set SVC_HOME to another disk; {_ANYWAY}",
        )
