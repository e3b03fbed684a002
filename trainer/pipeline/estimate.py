"""Estimates a recipe's memory and time, rejects runs that cannot fit, and compares estimates with actual
measurements.
"""

from dataclasses import replace

from svc.engine.device import read_capabilities
from svc.engine.machine import read_machine
from svc.errors import InsufficientMemoryError, SvcError
from svc.imports import without_garbage_collection
from svc.settings.settings import Settings
from svc.terminal import console
from trainer.base_model.find_base import find_config
from trainer.estimate.batches import read_workload
from trainer.estimate.checkpointing import choose_checkpointing, with_checkpointing
from trainer.estimate.devices import HERE, ComputeDevice, choose_devices
from trainer.estimate.estimate import DeviceEstimate, Estimate, estimate_recipe
from trainer.estimate.model_shape import read_model_shape
from trainer.estimate.refusal import refuse_disk, refuse_memory, refuse_stages
from trainer.estimate.render import print_short
from trainer.pipeline.examples import Examples
from trainer.pipeline.training_devices import find_devices
from trainer.recipe.recipe import Recipe
from trainer.training.summary import TrainingSummary


def estimate_devices(recipe: Recipe, examples: Examples, settings: Settings, names: tuple[str, ...] = ()) -> Estimate:
    """Estimate a recipe's memory, disk space, time and cost on the named devices, or on all devices if none are named.

    Raises:
        SvcError: a device is unknown, or the base's config or an example is invalid.
    """
    # First, so that a wrong name fails before anything is read.
    devices = [_several(device, recipe, settings) for device in choose_devices(names, settings.home)]
    folder = find_config(recipe.base, settings, recipe.chat_template, recipe.rope_scaling, recipe.new_tokens)
    with without_garbage_collection():
        import trainer.training.sft  # noqa: F401 - the first import of torch and TRL in `svc train`
    shape = read_model_shape(folder, recipe.adapter.targets)
    workload = read_workload(examples.preferences or examples.train, recipe, folder)
    return estimate_recipe(recipe, shape, workload, devices, settings.engine.max_model_len)


def _several(device: ComputeDevice, recipe: Recipe, settings: Settings) -> ComputeDevice:
    """Return a device whose `count` is the number of GPUs or processes that the recipe would train on.

    If `train.devices` is not set, the number is 1 for a GPU listed in gpus.yaml. For this machine, it is the number of
    devices that `find_devices` chooses.
    """
    asked = recipe.train.devices
    if device.name == HERE:
        gpus = () if device.cpu else read_machine(gpus=True).gpus
        gpu = None if device.cpu else read_capabilities(settings.home).gpu
        chosen = find_devices(recipe, gpu.name if gpu else None, gpus).devices
        count, free = len(chosen) or 1, [gpu.free for gpu in gpus if gpu.uuid in {one.uuid for one in chosen}]
        device = replace(device, memory=float(min(free, default=0)) or device.memory)
    else:
        count = len(asked) if isinstance(asked, tuple) else asked or 1
    if count == 1:
        return device
    return replace(device, count=count, label=f"{count} x {device.label}")


def estimate_here(
    recipe: Recipe,
    examples: Examples,
    settings: Settings,
    *,
    anyway: bool,
    makes_version: bool = True,
    trials: bool = False,
) -> DeviceEstimate | None:
    """Print and return the estimate for this machine, with gradient checkpointing chosen to fit a GPU's memory. Return
    None if no estimate is possible.

    Args:
        anyway: whether to continue instead of raising an error if the run cannot fit.
        makes_version: whether the run also writes merged and quantized models, not only an adapter.
        trials: whether several training runs with different settings and memory requirements follow. These runs keep
            the default for gradient checkpointing.

    Raises:
        InsufficientMemoryError: the run cannot fit into memory.
        DiskSpaceError: the disk has too little space for the version.
    """
    try:
        estimate = estimate_devices(recipe, examples, settings, (HERE,))
    except SvcError as error:  # training itself reports faults of base and data
        console.print(f"  [dim]no estimate: {error.wrong}[/dim]")
        return None
    chosen = choose_checkpointing(estimate)
    if not trials and not estimate.here.device.cpu:
        estimate = with_checkpointing(estimate, chosen.enabled, settings.engine.max_model_len)
        console.print(f"  gradient checkpointing: {'on' if chosen.enabled else 'off'} ({chosen.reason})")
    print_short(estimate)
    if not anyway:
        machine = read_machine(gpus=True)
        refuse_memory(estimate, machine)
        if makes_version:
            refuse_stages(estimate, machine)
            refuse_disk(estimate, settings.home)
    return estimate.here


def find_refusal(estimate: Estimate) -> str | None:
    """Return the reason why `svc train` would reject the run on this machine for lack of memory, or None if it would
    not.

    The result is None if the estimate does not include this machine.
    """
    if all(one.device.name != HERE for one in estimate.devices):
        return None
    machine = read_machine(gpus=True)
    try:
        refuse_memory(estimate, machine)
        refuse_stages(estimate, machine)
    except InsufficientMemoryError as error:
        return error.wrong
    return None


def compare_with_real(expected: DeviceEstimate, summary: TrainingSummary) -> TrainingSummary:
    """Print the measured memory and time next to their estimates, and return the summary with the estimates
    added.
    """
    compared = replace(summary, estimated_memory=expected.memory, estimated_seconds=expected.seconds)
    if summary.peak_memory is not None:
        console.print(
            f"  memory: {summary.peak_memory / 1e9:.2f} GB (estimated {expected.memory / 1e9:.2f}); "
            f"time: {summary.seconds:.0f} s (estimated {expected.seconds:.0f})"
        )
    return compared


def estimate_metrics(summary: TrainingSummary) -> dict[str, float]:
    """Return the estimated and measured memory and time as metrics for the tracking server. Unknown values are
    omitted.
    """
    figures = {
        "estimate.memory": summary.estimated_memory,
        "estimate.memory_real": summary.peak_memory,
        "estimate.seconds": summary.estimated_seconds,
        "estimate.seconds_real": summary.seconds,
    }
    return {name: float(value) for name, value in figures.items() if value is not None}
