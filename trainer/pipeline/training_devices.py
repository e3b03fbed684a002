"""Chooses the devices of a training run on this machine, and prints them with the reasons."""

from collections.abc import Sequence

from svc.dataset.schema.objective import Objective
from svc.engine.device import DeviceCapabilities
from svc.engine.machine import Gpu, read_machine
from svc.terminal import console
from trainer.recipe.sections import Recipe
from trainer.training.devices import DeviceChoice, TrainingDevice, choose_gpus, choose_processes, share_of


def choose_training_devices(recipe: Recipe, capabilities: DeviceCapabilities) -> tuple[TrainingDevice, ...]:
    """Return the devices that divide the training among them, and print what each one computes. The result is empty
    if the training runs in this process.

    Raises:
        RecipeError: the recipe asks for devices that are missing, in use or unequal, or among which a step cannot be
            divided.
    """
    first, train = capabilities.gpu.name if capabilities.gpu else None, recipe.train
    choice = find_devices(recipe, first, read_machine(gpus=True).gpus if first else ())
    for reason in choice.reasons:
        console.print(f"  {reason}", markup=False, soft_wrap=True)
    if choice.devices:
        share = share_of(train, len(choice.devices))
        names = ", ".join(device.name for device in choice.devices)
        if first is None:
            names = f"{len(choice.devices)} processes on the CPU"
        console.print(
            f"  train on {names}: each computes {share.accumulation} x {share.batch_size} of the "
            f"{train.gradient_accumulation} x {train.batch_size} examples of a step",
            markup=False,
            soft_wrap=True,
        )
    return choice.devices


def find_devices(recipe: Recipe, first: str | None, gpus: Sequence[Gpu]) -> DeviceChoice:
    """Return the devices of this machine that a recipe would train on. A preference is learnt in this process.

    Args:
        first: name of the GPU that torch would use alone, or None if training runs on the CPU.
        gpus: GPUs that this process may use.

    Raises:
        RecipeError: as for `choose_training_devices`.
    """
    if recipe.objective is not Objective.SFT:
        return DeviceChoice()
    return choose_gpus(recipe.train, gpus, first) if first else choose_processes(recipe.train)
