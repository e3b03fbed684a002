"""Gives advice when training runs out of memory: which setting to change, and its new value.

Imports torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from svc.errors import TrainingError
from trainer.recipe.recipe import Recipe
from trainer.training.arguments import checkpoints_layers


@contextmanager
def advising_on_memory(recipe: Recipe) -> Iterator[None]:
    """Turn an out-of-memory error in the `with` block into an error that names the setting to change.

    Raises:
        TrainingError: training ran out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if lack := out_of_memory(recipe, error, checkpointing=checkpoints_layers(recipe.train)):
            raise lack from error
        raise


def out_of_memory(recipe: Recipe, error: Exception, *, checkpointing: bool) -> TrainingError | None:
    """Return an error that names the cheapest change that would help, or None if the given error is not about
    memory.

    Args:
        checkpointing: whether gradient checkpointing was enabled, either in the recipe or by the machine's
            default.
    """
    message = str(error)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in message:
        return None
    return TrainingError(
        f"out of memory: {message.strip().splitlines()[0] if message else 'the machine has no free memory'}",
        expected=f"enough memory for batches of {recipe.train.batch_size} examples of up to {recipe.train.max_length} "
        "tokens",
        todo=f"{cheaper(recipe, checkpointing=checkpointing)}; the changed recipe starts a new run",
    )


def cheaper(recipe: Recipe, *, checkpointing: bool) -> str:
    """Return advice on which setting to change next. Settings that do not affect the result come first."""
    train = recipe.train
    if train.batch_size > 1:
        # With the largest divisor, a step has as many examples as before.
        size = next(size for size in range(train.batch_size // 2, 0, -1) if train.batch_size % size == 0)
        accumulation = train.gradient_accumulation * train.batch_size // size
        return (
            f"set train.batch_size to {size} and train.gradient_accumulation to {accumulation}, which leaves the "
            "optimizer steps unchanged"
        )
    if not checkpointing:
        return "set train.gradient_checkpointing to true, which is a third slower and gives the same result"
    if recipe.adapter_type is not None and recipe.base_quantization is None:
        return "set `quantization: nf4`, which reduces the memory of the frozen weights to a quarter or less"
    if recipe.adapter_type is None:
        return "set `method: lora`, because the optimizer state for all weights needs the most memory"
    return f"set train.max_length to {train.max_length // 2} and drop the longer examples, or use a smaller base model"
