"""Reads recipe files in YAML and applies command-line overrides. Errors name the key and its value."""

import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from svc.errors import RecipeError
from svc.files.yaml_text import parse_yaml
from svc.settings.dotted_keys import dotted_keys, suggest
from trainer.recipe.recipe import Recipe


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Load a recipe file and apply overrides.

    Args:
        overrides: `key=value` with a dotted key and a YAML value, for example `train.epochs=2`.

    Raises:
        RecipeError: the file is missing or not YAML, or a key is unknown or has an invalid value.
    """
    return make_recipe(read_content(path), overrides, path.absolute().parent, str(path))


def read_content(path: Path, kind: str = "recipe") -> dict[str, Any]:
    """Return the content of a YAML file.

    Args:
        kind: kind of the file, used in error messages.

    Raises:
        RecipeError: the file is missing or is not a YAML mapping.
    """
    try:
        content = parse_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot open {kind} {path}: {error.strerror}", todo="check the path") from error
    except ValueError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}", expected="a YAML mapping in UTF-8") from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path} must contain a YAML mapping, got {content!r:.80}", expected="keys such as name, base and data"
        )
    return content


def make_recipe(content: dict[str, Any], overrides: tuple[str, ...], folder: Path, origin: str) -> Recipe:
    """Return the recipe with the given content, after applying overrides.

    Args:
        folder: folder to which the recipe's paths are relative.
        origin: where the content comes from, used in error messages.

    Raises:
        RecipeError: a key is unknown or has an invalid value.
    """
    for override in overrides:
        _set(content, override)
    try:
        return Recipe.model_validate(content, context={"folder": folder})
    except ValidationError as error:
        raise _explain(origin, error) from error


def _set(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise RecipeError(f"cannot parse --set {override!r}", expected="key=value, for example train.epochs=2")
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise RecipeError(f"--set {override!r}: {section} is not a section", expected="a key such as train.epochs")
    try:
        content[last] = parse_yaml(value)
    except ValueError as error:
        raise RecipeError(f"--set {override!r}: {value!r} is not a valid YAML value") from error


def _explain(origin: str, error: ValidationError) -> RecipeError:
    problems = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        match problem["type"]:
            case "extra_forbidden":
                problems.append(f"unknown key {key!r}{suggest(key, [*recipe_keys(), *Recipe.model_fields])}")
            case "missing":
                problems.append(f"{key!r} is missing")
            case _ if not key:  # the problem concerns the whole recipe
                problems.append(str(problem["ctx"]["error"]))
            case _:
                problems.append(f"{key!r} is {problem['input']!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
    return RecipeError(
        f"{origin}: {'; '.join(problems)}", todo="see docs/recipe.md for every key, its type and its default"
    )


def recipe_keys() -> list[str]:
    """Return all recipe keys in dotted form."""
    return dotted_keys(Recipe)
