"""Rejects runs that cannot fit on this machine, by comparing each stage's minimum memory with the machine's total
memory.

Rejecting a run that would fit is worse than starting a run that fails. The minimum is therefore compared with the total
memory, not with the memory that is currently free.
"""

import shutil
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from svc.engine.machine import Machine
from svc.errors import DiskSpaceError, InsufficientMemoryError
from svc.version import QUANTIZED_FORMATS, Format
from trainer.estimate.advice import Changes, advise, as_text
from trainer.estimate.estimate import Estimate, estimate_device
from trainer.estimate.stages import StageMemory
from trainer.recipe.stage import Stage

_FEWER_FORMATS = (Format.MERGED, Format.GPTQ, Format.INT8, Format.ADAPTER)
_ANYWAY = "to start the run anyway, use --anyway"


def refuse_memory(estimate: Estimate, machine: Machine) -> None:
    """Raise InsufficientMemoryError if training does not fit into memory.

    Raises:
        InsufficientMemoryError: the message states how much memory is missing and which recipe keys to
            change.
    """
    here = estimate.here
    whole = float(machine.memory if here.device.cpu or not machine.gpus else machine.gpus[0].memory)
    if here.least > whole:
        changes = advise(estimate.recipe, estimate.shape, estimate.workload, here.device)
        todo = f"set {as_text(changes)}" if changes else "use a smaller base or another machine: see `svc estimate`"
        several = len(machine.gpus) > 1 and not here.device.cpu
        each, copy = " on each GPU" if several else "", ""
        if here.sharded:
            copy = f"; the weights are already sharded across {here.device.count} devices"
        elif here.device.count > 1:
            copy = f"; {here.undivided or 'train.sharding is never'}"
        raise InsufficientMemoryError(
            f"weights, gradients and optimizer state need at least {here.least / 1e9:.1f} GB{each}, but "
            f"{here.device.label} has {whole / 1e9:.1f} GB{each}: {(here.least - whole) / 1e9:.1f} GB short",
            expected=f"enough memory for weights, gradients and optimizer state, whatever the batch size{copy}",
            todo=f"{todo}; {_ANYWAY}",
        )


def refuse_stages(estimate: Estimate, machine: Machine) -> None:
    """Raise InsufficientMemoryError if a stage after training does not fit into memory.

    An engine may also use several GPUs and main memory, and the parity checks run on the CPU if the GPU is too small.
    The GPU memory that these stages need is therefore compared with the total memory of the machine.

    Raises:
        InsufficientMemoryError: the message names the stage, how much memory is missing, and a format that
            would fit.
    """
    for stage in estimate.here.stages:
        if (lack := _missing(stage, machine)) > 0:
            whole = _all_memory(machine) if stage.least.device else float(machine.memory)
            need = max(stage.least.device, stage.least.ram)
            raise InsufficientMemoryError(
                f"stage {stage.stage} needs at least {need / 1e9:.1f} GB, but this machine has {whole / 1e9:.1f} GB: "
                f"{lack / 1e9:.1f} GB short",
                expected="enough memory for every stage of the run",
                todo=f"{_other_formats(estimate, machine)}; {_ANYWAY}",
            )


def _missing(stage: StageMemory, machine: Machine) -> float:
    """Return how many bytes this machine lacks for a stage after training. The result is 0 or less if the stage
    fits.
    """
    if stage.stage is Stage.TRAIN:
        return 0.0
    return max(stage.least.ram - machine.memory, stage.least.device - _all_memory(machine))


def _all_memory(machine: Machine) -> float:
    return float(machine.memory + sum(gpu.memory for gpu in machine.gpus))


def _other_formats(estimate: Estimate, machine: Machine) -> str:
    """Return advice to reduce the recipe's formats to a single format with which every stage would fit, or other
    advice if there is no such format.
    """
    recipe, device = estimate.recipe, estimate.here.device
    for format in _FEWER_FORMATS if recipe.adapter_type else _FEWER_FORMATS[:-1]:
        changes: Changes = {"formats": [format]}
        if format in QUANTIZED_FORMATS and recipe.evaluate.general is not False:
            changes["evaluate.general"] = False  # with general questions, an engine must hold the base too
        changed = recipe.changed(changes)
        # The minimum of stages after training does not depend on the length of a sequence.
        alternative = estimate_device(changed, estimate.shape, estimate.workload, device, served_length=1)
        if changed != recipe and all(_missing(stage, machine) <= 0 for stage in alternative.stages):
            return f"set {as_text(changes)}"
    return "use a smaller base or another machine: see `svc estimate`"


def refuse_disk(estimate: Estimate, home: Path) -> None:
    """Raise DiskSpaceError if the disk has too little free space for the run's output.

    Args:
        home: folder to which the run writes.

    Raises:
        DiskSpaceError: the message names the stage that would fill the disk and how much space is missing.
    """
    if any((home / "runs").glob(f"{estimate.recipe.name}-*")):
        return  # the outputs of an earlier run are not written again
    folder = next(above for above in (home, *home.absolute().parents) if above.exists())
    stages = estimate.here.stages
    free, written = shutil.disk_usage(folder).free, list(accumulate(stage.least.disk for stage in stages))
    need = written[-1]
    if need > free:
        stage = stages[bisect_right(written, free)]
        raise DiskSpaceError(
            f"the run will write at least {need / 1e9:.1f} GB in {home}, but only {free / 1e9:.1f} GB are free; stage "
            f"{stage.stage} would fill the disk",
            todo=f"free up {(need - free) / 1e9:.1f} GB or set SVC_HOME to another disk; {_ANYWAY}",
        )
