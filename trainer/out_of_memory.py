"""What to do when training runs out of memory: which setting to lower, and to what.

Loaded only inside functions: it imports torch.
"""

import torch

from svc.errors import TrainingError
from trainer.recipe import Method, Recipe


def out_of_memory(recipe: Recipe, error: Exception) -> TrainingError | None:
    """What to do about a lack of memory: the cheapest change that helps; None when the error is another one."""
    told = str(error)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in told:
        return None
    return TrainingError(
        f"out of memory: {told.strip().splitlines()[0] if told else 'the machine has no more'}",
        expected=f"room for train.batch_size {recipe.train.batch_size} of up to {recipe.train.max_length} tokens",
        todo=f"{cheaper(recipe)}; checkpoints of this run are kept",
    )


def cheaper(recipe: Recipe) -> str:
    """The next setting to lower, and to what: first what changes no result, last what changes the method."""
    train = recipe.train
    if train.batch_size > 1:
        half = train.batch_size // 2
        accumulation = train.gradient_accumulation * train.batch_size // half
        return (
            f"set train.batch_size to {half} and train.gradient_accumulation to {accumulation}: the steps stay the same"
        )
    if not train.gradient_checkpointing:
        return "set train.gradient_checkpointing to true: slower by a third, and the result is the same"
    if recipe.method not in (Method.QLORA, Method.FULL):
        return "set method to qlora: the frozen weights take a quarter of the memory"
    if recipe.method is Method.FULL:
        return "set method to lora: an optimizer's state for all weights is what takes most"
    return f"set train.max_length to {train.max_length // 2} and drop the longer examples, or use a smaller base model"
