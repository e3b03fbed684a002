"""What is tried: the default values of each phase, scaled to the method's own range, or the recipe's own space."""

import itertools
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from svc.errors import RecipeError
from trainer.recipe.sections import Between, Recipe
from trainer.sweep.values import Values, with_values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RATE, RANK, EPOCHS, STEPS = "train.learning_rate", "adapter.rank", "train.epochs", "train.steps"
TARGETS, DROPOUT = "adapter.targets", "adapter.dropout"
_RATES = (1e-5, 5e-5, 1e-4, 2e-4, 5e-4)
"""LoRA's customary range; its default in this project is the last."""
_LORA_RATE = 5e-4
_RANKS, _LORA_RANK = (8, 16, 32), 16
EPOCHS_TRIED = (1.0, 2.0, 3.0)


class Phase(StrEnum):
    """What a trial was made for; each phase starts from the values that the one before has chosen."""

    LEARNING_RATE = "learning rate"
    RANK = "rank"
    EPOCHS = "epochs"
    TARGETS = "targets"
    DROPOUT = "dropout"
    RECIPE = "the recipe as it is"
    SPACE = "own space"


def learning_rates(recipe: Recipe) -> tuple[float, ...]:
    """Ascending: the customary ones times what the method's default is of LoRA's, and the recipe's own."""
    default = with_values(recipe, {RATE: None}).learning_rate
    scaled = {float(f"{rate * default / _LORA_RATE:.3g}") for rate in _RATES}
    return tuple(sorted(scaled | {recipe.learning_rate}))


def ranks(recipe: Recipe) -> tuple[int, ...]:
    """Ascending: 8, 16 and 32 times what the method's default is of LoRA's, and the recipe's own; none in full."""
    if recipe.adapter_type is None:
        return ()
    default = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"rank": None})}).rank
    found = sorted({rank * default // _LORA_RANK for rank in _RANKS} | {recipe.rank})
    return tuple(rank for rank in found if _is_possible(recipe, {RANK: rank}))


def _is_possible(recipe: Recipe, values: Values) -> bool:
    try:
        with_values(recipe, values)
    except RecipeError:  # as a rank above adapter.initial_rank
        return False
    return True


def combinations(recipe: Recipe) -> list[Values] | None:
    """All of an own space, where it consists of lists and has no more than are to be tried."""
    space = recipe.sweep.space or {}
    if any(isinstance(one, Between) for one in space.values()):
        return None
    lists = [one for one in space.values() if isinstance(one, tuple)]
    if math.prod(map(len, lists)) > recipe.sweep.trials:
        return None
    return [dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*lists)]


def check_space(recipe: Recipe) -> None:
    """Tries each value of an own space in the recipe, before hours are spent.

    Raises:
        RecipeError: its key does not take it.
    """
    for key, values in (recipe.sweep.space or {}).items():
        for value in (values.low, values.high) if isinstance(values, Between) else values:
            with_values(recipe, {key: value})


def distributions(space: Mapping[str, Sequence[Any] | Between]) -> dict[str, "BaseDistribution"]:
    """A space as Optuna has it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for key, values in space.items():
        if not isinstance(values, Between):
            found[key] = CategoricalDistribution(tuple(values))
        elif isinstance(values.low, int) and isinstance(values.high, int):
            found[key] = IntDistribution(values.low, values.high, log=values.log)
        else:
            found[key] = FloatDistribution(float(values.low), float(values.high), log=values.log)
    return found
