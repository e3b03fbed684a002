"""What to change in a recipe that does not fit: the fewest keys, in the order of what they cost.

Each proposal was computed with all its changes, so that it is true as far as the estimate is. First comes what changes
no result (smaller batches with more accumulation, checkpointing), then what rounds the optimizer's moments, then what
changes the method, last what learns less.
"""

import json
from collections.abc import Iterator
from typing import Any

from trainer.estimate.batches import Workload, shortened, with_batch_size
from trainer.estimate.devices import ComputeDevice
from trainer.estimate.estimate import memory_on
from trainer.estimate.model_shape import ModelShape
from trainer.recipe.sections import Optimizer, Recipe, Train

_FEWEST_RANKS, _SHORTEST = 8, 256

Changes = dict[str, Any]


def advise(recipe: Recipe, shape: ModelShape, workload: Workload, device: ComputeDevice) -> dict[str, Any] | None:
    """Keys and values with which it fits; empty where it does as it is, None where nothing helps."""

    def fits(changes: Changes) -> bool:
        changed = changed_recipe(recipe, changes)
        size, longest = changed.train.batch_size, changed.train.max_length
        return memory_on(changed, shape, with_batch_size(shortened(workload, longest), size), device) <= device.memory

    changes: Changes = {}
    if fits(changes):
        return changes
    for step in _steps(recipe, device):
        if "method" in step:  # an adapter's moments are small whatever they are stored in
            changes.pop("train.optimizer", None)
        changes = changes | step
        smallest = changes | _batch(recipe.train, 1)
        if fits(smallest):
            return next(found for size in _sizes(recipe.train) if fits(found := changes | _batch(recipe.train, size)))
    return None


def changed_recipe(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with other values of dotted keys."""
    content = recipe.model_dump(exclude_unset=True)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (content.setdefault(section, {}) if section else content)[name] = value
    return Recipe.model_validate(content)


def _steps(recipe: Recipe, device: ComputeDevice) -> Iterator[Changes]:
    """Each is taken beside those before it."""
    yield {}
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
    if recipe.rank > _FEWEST_RANKS:
        yield {"adapter.rank": _FEWEST_RANKS}
    longest = recipe.train.max_length
    while (longest := longest // 2) >= _SHORTEST:
        yield {"train.max_length": longest, "train.too_long": "drop"}


def _sizes(train: Train) -> list[int]:
    """Batches of which the same number of steps can be made, the largest first."""
    size = train.batch_size
    return [one for one in range(size, 0, -1) if size % one == 0]


def _batch(train: Train, size: int) -> Changes:
    if size == train.batch_size:
        return {}
    accumulation = train.gradient_accumulation * train.batch_size // size
    return {"train.batch_size": size, "train.gradient_accumulation": accumulation}


def as_text(changes: Changes) -> str:
    """For `--set`, and for people."""
    return ", ".join(
        f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in changes.items()
    )
