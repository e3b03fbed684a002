"""Chooses the devices of this machine on which a model is trained, and divides the batches of a step among them.

Only identical GPUs train together, because all GPUs wait for the slowest one and need the same amount of memory. This
module does not import torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from svc.engine.device import NumberType
from svc.engine.machine import Gpu
from svc.errors import RecipeError
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import Train

_MAX_USED = 1.5 * 2**30
"""A GPU counts as free if at most this many bytes of its memory are in use, for example by a desktop environment or by
this process, which may have measured the GPU's speed for an estimate."""


@dataclass(frozen=True, slots=True)
class TrainingDevice:
    """A device that one process trains on.

    Attributes:
        name: name shown in messages.
        uuid: identifies a GPU; empty for the CPU.
    """

    name: str
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """The devices of a training run.

    Attributes:
        devices: devices to train on, with one process for each. Empty if the run trains in the current process, on the
            first GPU or the CPU.
        reasons: reasons why other GPUs are not used, and warnings about listed GPUs that are in use.
    """

    devices: tuple[TrainingDevice, ...] = ()
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Share:
    """The part of each optimizer step that one device computes.

    Attributes:
        batch_size: number of examples per batch.
        accumulation: number of batches.
    """

    batch_size: int
    accumulation: int


def divide_step(train: Train, devices: int) -> Share | None:
    """Return the batch size and gradient accumulation per device, or None if the examples of a step cannot be divided
    equally. The total number of examples in a step is the same as on one device.

    Gradient accumulation is reduced first, because smaller batches use a device less efficiently.
    """
    common = math.gcd(train.gradient_accumulation, devices)
    rest = devices // common
    if train.batch_size % rest:
        return None
    return Share(train.batch_size // rest, train.gradient_accumulation // common)


def share_of(train: Train, devices: int) -> Share:
    """Return each device's share of a step.

    Raises:
        RecipeError: a step cannot be divided among the devices.
    """
    if share := divide_step(train, devices):
        return share
    step = f"{train.batch_size} x {train.gradient_accumulation}"
    counts = range(1, train.batch_size * train.gradient_accumulation + 1)
    possible = [count for count in counts if divide_step(train, count)]
    near = [count for count in possible if count < devices][-1:] + [count for count in possible if count > devices][:1]
    raise RecipeError(
        f"a step of {step} examples cannot be divided among {devices} devices",
        expected="train.batch_size x train.gradient_accumulation divisible by the number of devices",
        todo=f"set train.devices to {' or '.join(map(str, near))}, or change train.batch_size",
    )


def find_undivided(recipe: Recipe, number_type: NumberType, *, experts: bool) -> str | None:
    """Return the reason why the weights cannot be sharded across devices, or None if they can.

    Args:
        number_type: data type of the matrix products.
        experts: whether the base is a mixture of experts.
    """
    if number_type is NumberType.FLOAT16:
        return "loss scaling, which float16 needs, has not been tested with sharded weights"
    if experts:
        return "a mixture of experts has not been tested with sharded weights"
    return recipe.undivided


def choose_processes(train: Train) -> DeviceChoice:
    """Return the processes that train on the CPU: one, unless the recipe requires several.

    Raises:
        RecipeError: the recipe lists GPUs, or the examples of a step cannot be divided evenly among the processes.
    """
    if isinstance(train.devices, tuple):
        raise RecipeError(
            f"train.devices lists GPUs {_numbers(train.devices)}, but training runs on the CPU",
            expected="a number of processes instead of a list of GPUs",
            todo="remove train.devices from the recipe",
        )
    count = train.devices or 1
    if count == 1:
        return DeviceChoice()
    share_of(train, count)
    return DeviceChoice((TrainingDevice("the CPU"),) * count)


def choose_gpus(train: Train, gpus: Sequence[Gpu], first: str) -> DeviceChoice:
    """Return the GPUs to train on: the GPUs that the recipe lists, or else the first GPUs that are free and identical.
    Without `train.devices`, the number of GPUs is the largest number of free GPUs among which a step can be divided.

    Args:
        gpus: GPUs that this process may use, in the order of their indices.
        first: name of the GPU that torch would use by default, which determines the data type.

    Raises:
        RecipeError: a listed GPU does not exist or differs from the GPU that torch would use, fewer GPUs are free than
            the recipe requires, or the examples of a step cannot be divided evenly among the GPUs.
    """
    asked = train.devices
    reasons: list[str] = []
    if len(gpus) < 2 and asked in (None, 1, (0,)):
        return DeviceChoice()
    if isinstance(asked, tuple):
        chosen = _listed(asked, gpus, first)
        share_of(train, len(chosen))
        reasons = [f"GPU {number} is listed, but {use}" for number in chosen if (use := _use(gpus[number]))]
    else:
        free, reasons = _free(gpus, first)
        chosen = free[: asked or len(free)]
        if asked is None:
            while len(chosen) > 1 and divide_step(train, len(chosen)) is None:
                chosen = chosen[:-1]
            if left := free[len(chosen) :]:
                reasons.append(
                    f"GPU {_numbers(left)} not used: a step of {train.batch_size} x {train.gradient_accumulation} "
                    f"examples cannot be divided among {len(free)} devices"
                )
        elif len(chosen) < asked:
            raise _too_few(asked, len(free), reasons)
        else:
            share_of(train, asked)
    if chosen in ([], [0]):  # torch would use it anyway, or report why it cannot
        return DeviceChoice((), tuple(reasons))
    devices = tuple(TrainingDevice(f"GPU {number} ({gpus[number].name})", gpus[number].uuid) for number in chosen)
    return DeviceChoice(devices, tuple(reasons))


def _too_few(asked: int, free: int, reasons: Sequence[str]) -> RecipeError:
    usable = {0: "no GPU is free", 1: "only 1 GPU is free"}.get(free, f"only {free} identical GPUs are free")
    return RecipeError(
        f"train.devices is {asked}, but {usable}: {'; '.join(reasons) or 'this process can use no other GPU'}",
        expected=f"at most {free}" if free else "at least one free GPU",
        todo="lower train.devices, or stop the processes that use the other GPUs"
        if free
        else "stop the processes that use the GPUs",
    )


def _free(gpus: Sequence[Gpu], first: str) -> tuple[list[int], list[str]]:
    """Return the indices of the free GPUs that are identical to the GPU that torch would use, and the reasons why the
    other GPUs are not used.
    """
    free: list[int] = []
    reasons: list[str] = []
    model = next((gpu for gpu in gpus if gpu.name == first), None)
    if model is None:
        return free, [f"nvidia-smi does not list {first}"]
    for number, gpu in enumerate(gpus):
        if (gpu.name, gpu.memory) != (model.name, model.memory):
            reasons.append(f"GPU {number} not used: {_described(gpu)} differs from {_described(model)}")
        elif use := _use(gpu):
            reasons.append(f"GPU {number} not used: {use}")
        else:
            free.append(number)
    return free, reasons


def _listed(numbers: Sequence[int], gpus: Sequence[Gpu], first: str) -> list[int]:
    """Return the GPU indices that the recipe lists, after checking that these GPUs exist and are identical to the GPU
    that torch would use.
    """
    if missing := [number for number in numbers if number >= len(gpus)]:
        raise RecipeError(
            f"train.devices lists GPU {missing[0]}, but the number of GPUs that this process may use is {len(gpus)}",
            expected=f"indices from 0 to {len(gpus) - 1}, in the order of nvidia-smi or CUDA_VISIBLE_DEVICES",
            todo="change train.devices",
        )
    different = [number for number in numbers if gpus[number].name != first]
    different += [number for number in numbers if gpus[number].memory != gpus[numbers[0]].memory]
    if different:
        listed = ", ".join(f"GPU {number}: {_described(gpus[number])}" for number in numbers)
        raise RecipeError(
            f"train.devices lists GPUs that differ from each other or from {first}, the GPU that torch would use by "
            f"default: {listed}",
            expected="identical GPUs, because every GPU waits for the slowest",
            todo=f"list only identical GPUs in train.devices; to use a GPU type other than {first}, set "
            "CUDA_VISIBLE_DEVICES to GPUs of that type",
        )
    return list(numbers)


def _use(gpu: Gpu) -> str:
    """Return text that says how much of a GPU's memory is in use, or an empty string if the GPU counts as free."""
    used = gpu.memory - gpu.free
    return f"another process uses {used / 1e9:.1f} GB of it" if used > _MAX_USED else ""


def _described(gpu: Gpu) -> str:
    return f"{gpu.name} with {gpu.memory / 2**30:.0f} GiB"


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
