"""Changes that a trial makes to a recipe: values keyed by recipe key, for example `train.learning_rate`."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from svc.errors import RecipeError
from trainer.recipe.recipe import Recipe

Values = Mapping[str, Any]
"""Recipe values keyed by dotted key, for example `{"train.learning_rate": 1e-4}`."""


def with_values(recipe: Recipe, values: Values) -> Recipe:
    """Return a copy of the recipe with the given values changed and without its `sweep` section.

    Raises:
        RecipeError: a value is not valid for its key, or is inconsistent with other values.
    """
    try:
        return recipe.changed(values, without="sweep")
    except ValidationError as error:
        problems = "; ".join(problem["msg"] for problem in error.errors())
        raise RecipeError(
            f"{describe(values)} is not valid in this recipe: {problems}", todo="change sweep.space, see docs/recipe.md"
        ) from error


def training_key(recipe: Recipe) -> str:
    """Return a key that identifies a trial's training. The key does not depend on whether a default value is
    set explicitly.
    """
    content = {key: value for key, value in recipe.flat().items() if key.startswith(("adapter.", "train."))}
    if recipe.train.steps is not None:
        content.pop("train.epochs")
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def describe(values: Values) -> str:
    """Return the changed values as text for display, as in `learning_rate 0.0002, rank 8`."""
    parts = [f"{key.rpartition('.')[2]} {show(value)}" for key, value in values.items() if value is not None]
    return ", ".join(parts) or "unchanged recipe"


def show(value: Any) -> str:
    """Format a single value for display."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
