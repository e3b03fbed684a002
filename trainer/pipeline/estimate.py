"""What a recipe takes: from its file and its examples to figures, to a refusal, and beside what training took."""

from dataclasses import replace

from svc.engine.machine import read_machine
from svc.errors import SvcError
from svc.settings import Settings
from svc.terminal import console
from trainer.estimate.batches import read_workload
from trainer.estimate.devices import HERE, choose_devices
from trainer.estimate.estimate import DeviceEstimate, Estimate, estimate_recipe
from trainer.estimate.model_shape import read_model_shape
from trainer.estimate.refusal import refuse_disk, refuse_memory, refuse_stages
from trainer.estimate.render import print_short
from trainer.pipeline.examples import Examples
from trainer.pipeline.find_base import find_config
from trainer.recipe.sections import Recipe
from trainer.training.summary import TrainingSummary


def estimate_devices(recipe: Recipe, examples: Examples, settings: Settings, names: tuple[str, ...] = ()) -> Estimate:
    """What a recipe takes on these devices; on all where none is named.

    Raises:
        SvcError: a name, the base's config or an example is wrong.
    """
    devices = choose_devices(names, settings.home)  # a wrong name is told before anything is read
    folder = find_config(recipe.base, settings)
    shape = read_model_shape(folder, recipe.adapter.targets)
    workload = read_workload(examples.train, recipe, folder)
    return estimate_recipe(recipe, shape, workload, devices, settings.engine.max_model_len)


def estimate_here(
    recipe: Recipe, examples: Examples, settings: Settings, *, anyway: bool, makes_version: bool = True
) -> DeviceEstimate | None:
    """Says what training will take here, and refuses what cannot be; None where the base's config is not understood.

    Args:
        anyway: refuses nothing.
        makes_version: merged and quantized models are written too; else adapters alone.

    Raises:
        InsufficientMemoryError: it cannot fit.
        DiskSpaceError: there is no room for the version.
    """
    try:
        made = estimate_devices(recipe, examples, settings, (HERE,))
    except SvcError as error:  # what is wrong with base or data, training says itself
        console.print(f"  [dim]no estimate: {error.wrong}[/dim]")
        return None
    print_short(made)
    if not anyway:
        machine = read_machine(gpus=True)
        refuse_memory(made, machine)
        if makes_version:
            refuse_stages(made, machine)
            refuse_disk(made, settings.home)
    return made.here


def compare_with_real(expected: DeviceEstimate, summary: TrainingSummary) -> TrainingSummary:
    """Says both, and returns the summary with what was estimated."""
    compared = replace(summary, estimated_memory=expected.memory, estimated_seconds=expected.seconds)
    if summary.peak_memory is not None:
        console.print(
            f"  memory: {summary.peak_memory / 1e9:.2f} GB, {expected.memory / 1e9:.2f} were estimated; "
            f"time: {summary.seconds:.0f} s, {expected.seconds:.0f} were estimated"
        )
    return compared


def estimate_metrics(summary: TrainingSummary) -> dict[str, float]:
    """For the tracking server: estimated, real, and their ratios where both are known."""
    figures = {
        "estimate.memory": summary.estimated_memory,
        "estimate.memory_real": summary.peak_memory,
        "estimate.seconds": summary.estimated_seconds,
        "estimate.seconds_real": summary.seconds,
    }
    return {name: float(value) for name, value in figures.items() if value is not None}
