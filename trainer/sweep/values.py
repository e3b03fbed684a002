"""What a trial changes in a recipe: dotted keys with their values."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from svc.errors import RecipeError
from trainer.recipe.sections import Recipe

Values = Mapping[str, Any]
"""As `{"train.learning_rate": 1e-4}`."""


def with_values(recipe: Recipe, values: Values) -> Recipe:
    """The recipe with other values, and without a search of its own.

    Raises:
        RecipeError: a value that its key does not take, or that does not go with the others.
    """
    content = recipe.model_dump(exclude_unset=True)
    content.pop("sweep", None)
    for key, value in values.items():
        section, _, name = key.partition(".")
        content[section] = content.get(section, {}) | {name: value}
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        said = "; ".join(problem["msg"] for problem in error.errors())
        raise RecipeError(
            f"{describe(values)} does not fit the recipe: {said}", todo="change sweep.space, see docs/recipe.md"
        ) from error


def training_key(recipe: Recipe) -> str:
    """Names what a trial of a recipe trains: the same for a default and for the value that it stands for."""
    adapter, train = recipe.adapter.model_dump(mode="json"), recipe.train.model_dump(mode="json")
    train |= {"learning_rate": recipe.learning_rate}
    if train["steps"] is not None:
        train.pop("epochs")
    if recipe.adapter_type is not None:
        adapter |= {"type": recipe.adapter_type, "rank": recipe.rank, "alpha": recipe.alpha}
        adapter |= {"initial_rank": recipe.initial_rank}
    return hashlib.sha256(json.dumps([adapter, train], sort_keys=True).encode()).hexdigest()[:12]


def describe(values: Values) -> str:
    """For a person: `learning_rate 0.0002, rank 8`."""
    said = [f"{key.rpartition('.')[2]} {show(value)}" for key, value in values.items() if value is not None]
    return ", ".join(said) or "as the recipe says"


def show(value: Any) -> str:
    """One value."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
