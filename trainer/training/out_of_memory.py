"""What to do when training runs out of memory: which setting to lower, and to what.

Imports torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from svc.errors import TrainingError
from trainer.recipe.sections import Recipe
from trainer.training.arguments import checkpoints_layers


@contextmanager
def advising_on_memory(recipe: Recipe) -> Iterator[None]:
    """Inside, a lack of memory says which setting to lower.

    Raises:
        TrainingError: memory is short.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if lack := out_of_memory(recipe, error, checkpointing=checkpoints_layers(recipe.train)):
            raise lack from error
        raise


def out_of_memory(recipe: Recipe, error: Exception, *, checkpointing: bool) -> TrainingError | None:
    """What to do about a lack of memory: the cheapest change that helps; None when the error is another one.

    Args:
        checkpointing: whether layers were computed twice to keep little of them, as the recipe or the machine decided.
    """
    told = str(error)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in told:
        return None
    return TrainingError(
        f"out of memory: {told.strip().splitlines()[0] if told else 'the machine has no more'}",
        expected=f"room for train.batch_size {recipe.train.batch_size} of up to {recipe.train.max_length} tokens",
        todo=f"{cheaper(recipe, checkpointing=checkpointing)}; that is another run, and begins anew",
    )


def cheaper(recipe: Recipe, *, checkpointing: bool) -> str:
    """The next setting to lower, and to what: first what changes no result, last what changes the method."""
    train = recipe.train
    if train.batch_size > 1:
        # The largest divisor: a step has as many examples as before.
        size = next(size for size in range(train.batch_size // 2, 0, -1) if train.batch_size % size == 0)
        accumulation = train.gradient_accumulation * train.batch_size // size
        return (
            f"set train.batch_size to {size} and train.gradient_accumulation to {accumulation}: the steps stay the same"
        )
    if not checkpointing:
        return "set train.gradient_checkpointing to true: slower by a third, and the result is the same"
    if recipe.adapter_type is not None and recipe.base_quantization is None:
        return "set quantization to nf4: the frozen weights take a quarter of the memory, or less"
    if recipe.adapter_type is None:
        return "set method to lora: an optimizer's state for all weights is what takes most"
    return f"set train.max_length to {train.max_length // 2} and drop the longer examples, or use a smaller base model"
