"""Proposes changes to a recipe that does not fit in memory. As few keys as possible are changed, cheapest
changes first.

Every proposal is estimated with all of its changes applied, so it is as accurate as the estimate itself. Changes that
do not affect the result come first (smaller batches with more accumulation, weights sharded across devices,
checkpointing), followed by 8-bit optimizer moments, then a different method, and finally changes that reduce
what is learned.
"""

import json
from collections.abc import Iterator
from typing import Any

from trainer.estimate.batches import Workload
from trainer.estimate.devices import ComputeDevice
from trainer.estimate.estimate import memory_on
from trainer.estimate.model_shape import ModelShape
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import Optimizer, Sharding, Train

_MIN_RANK, _MIN_LENGTH = 8, 256

Changes = dict[str, Any]


def advise(recipe: Recipe, shape: ModelShape, workload: Workload, device: ComputeDevice) -> dict[str, Any] | None:
    """Return the changes that make a recipe fit in memory. The result is empty if the recipe already fits, and None if
    no change helps.
    """

    def fits(changes: Changes) -> bool:
        changed = recipe.changed(changes)
        batch = workload.largest.shortened(changed.train.max_length).resized(changed.train.batch_size)
        return memory_on(changed, shape, batch, device) <= device.memory

    changes: Changes = {}
    if fits(changes):
        return changes
    for step in _steps(recipe, device):
        if "method" in step:  # an adapter's moments are small in any format
            changes.pop("train.optimizer", None)
        changes = changes | step
        smallest = changes | _batch(recipe.train, 1)
        if fits(smallest):
            candidates = (changes | _batch(recipe.train, size) for size in _sizes(recipe.train))
            return next(candidate for candidate in candidates if fits(candidate))
    return None


def _steps(recipe: Recipe, device: ComputeDevice) -> Iterator[Changes]:
    """Yield changes to the recipe, cheapest first. Each change is applied on top of all earlier changes."""
    yield {}
    if recipe.train.sharding is Sharding.NEVER and device.count > 1 and not recipe.undivided:
        yield {"train.sharding": Sharding.AUTO.value}
    asked = recipe.train.gradient_checkpointing
    if asked is False or (asked is None and device.cpu):
        yield {"train.gradient_checkpointing": True}
    if recipe.adapter_type is None:
        if recipe.train.optimizer is Optimizer.ADAMW:
            yield {"train.optimizer": Optimizer.ADAMW_8BIT.value}
            if not device.cpu:
                yield {"train.optimizer": Optimizer.PAGED_ADAMW_8BIT.value}
        yield {"method": "lora"}
        yield {"method": "qlora"}
    elif recipe.base_quantization is None:
        yield {"quantization": "nf4"}
    if recipe.rank > _MIN_RANK:
        yield {"adapter.rank": _MIN_RANK}
    longest = recipe.train.max_length
    while (longest := longest // 2) >= _MIN_LENGTH:
        yield {"train.max_length": longest, "train.too_long": "drop"}


def _sizes(train: Train) -> list[int]:
    """Return the divisors of the recipe's batch size, largest first. With a divisor as the batch size, gradient
    accumulation can keep the number of steps the same.
    """
    size = train.batch_size
    return [divisor for divisor in range(size, 0, -1) if size % divisor == 0]


def _batch(train: Train, size: int) -> Changes:
    if size == train.batch_size:
        return {}
    accumulation = train.gradient_accumulation * train.batch_size // size
    return {"train.batch_size": size, "train.gradient_accumulation": accumulation}


def as_text(changes: Changes) -> str:
    """Format recipe changes for `--set` and for messages."""
    return ", ".join(
        f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in changes.items()
    )
