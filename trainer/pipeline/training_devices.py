"""Chooses the devices of a training run on this machine, and prints the choice and the reasons for it."""

from collections.abc import Sequence

from svc.engine.device import DeviceCapabilities, NumberType
from svc.engine.machine import Gpu, read_machine
from svc.errors import RecipeError
from svc.terminal import console
from trainer.estimate.estimate import DeviceEstimate
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import Sharding
from trainer.training.parallel.devices import (
    DeviceChoice,
    TrainingDevice,
    choose_gpus,
    choose_processes,
    find_undivided,
    share_of,
)


def choose_training_devices(recipe: Recipe, capabilities: DeviceCapabilities) -> tuple[TrainingDevice, ...]:
    """Return the devices to train on, and print each device's share of a step. The result is empty if training runs in
    this process.

    Raises:
        RecipeError: the recipe lists GPUs that are missing or not identical, requires more GPUs than are free, or
            defines a step that cannot be divided among the devices.
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
            f"  training on {names}: each handles {share.accumulation} x {share.batch_size} of the "
            f"{train.gradient_accumulation} x {train.batch_size} examples in a step",
            markup=False,
            soft_wrap=True,
        )
    return choice.devices


def choose_sharding(recipe: Recipe, devices: int, number_type: NumberType, expected: DeviceEstimate | None) -> bool:
    """Return whether the weights are sharded across the devices instead of replicated on each device, and print the
    choice.

    Args:
        devices: number of devices.
        expected: estimate for this machine, or None if unknown.

    Raises:
        RecipeError: the recipe requires sharding, but the weights cannot be sharded.
    """
    asked = recipe.train.sharding
    if devices < 2 or asked is Sharding.NEVER:
        return False
    if asked is Sharding.AUTO and not (expected and expected.sharded):
        return False
    if reason := find_undivided(recipe, number_type, experts=False):
        raise RecipeError(f"train.sharding is {asked}, but {reason}", todo=f"set train.sharding to {Sharding.NEVER}")
    console.print(f"  each device stores 1/{devices} of the weights, gradients and optimizer moments", soft_wrap=True)
    return True


def find_devices(recipe: Recipe, first: str | None, gpus: Sequence[Gpu]) -> DeviceChoice:
    """Return the devices on this machine that a training run with the recipe would use.

    Args:
        first: name of the GPU that torch would use by default, or None if training runs on the CPU.
        gpus: GPUs that this process may use.

    Raises:
        RecipeError: as for `choose_training_devices`.
    """
    return choose_gpus(recipe.train, gpus, first) if first else choose_processes(recipe.train)
