"""Types for recipe values that are paths or names of files. Relative paths are resolved against the recipe's folder."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, WithJsonSchema

from svc.dataset.readers.source import HUB_PREFIX
from svc.evaluation.metrics.function import FunctionSpec
from trainer.recipe.named_template import TEMPLATE_CHOICES, NamedTemplate


def beside_recipe(value: Any, info: ValidationInfo) -> Any:
    """Resolve a path relative to the recipe's folder, so that a recipe works from any working directory.

    A value that is not a path is returned unchanged.
    """
    folder = (info.context or {}).get("folder", Path())
    try:
        return (folder / value.expanduser()).absolute() if isinstance(value, Path) else value
    except RuntimeError as error:
        raise ValueError(f"cannot expand {value}: there is no such user on this machine") from error


def _as_sources(value: Any) -> Any:
    """Wrap a single data source in a list. Other values are returned unchanged."""
    return [str(value)] if isinstance(value, str | Path) else value


def _sources_beside_recipe(sources: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    return tuple(
        source if source.startswith(HUB_PREFIX) else str(beside_recipe(Path(source), info)) for source in sources
    )


def _as_template(value: Any) -> Any:
    """Parse a value as the name of a chat template or as the path of a file ending in .jinja.

    Raises:
        ValueError: the value is neither.
    """
    if value in tuple(NamedTemplate):
        return NamedTemplate(value)
    if value is None or (isinstance(value, str | Path) and Path(value).suffix == ".jinja"):
        return value and Path(value)
    raise ValueError(f"expected {TEMPLATE_CHOICES}")


def is_folder(name: str) -> bool:
    """Return whether the name of a model is a path rather than a Hugging Face Hub id."""
    return name.startswith((".", "/", "~"))


HUB_ID_PATTERN = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"


def folder_beside_recipe(name: str | None, info: ValidationInfo) -> str | None:
    """If the name of a model is the path of a folder, resolve it relative to the recipe's folder."""
    return str(beside_recipe(Path(name), info)) if name and is_folder(name) else name


FolderOrHubId = Annotated[
    Annotated[str, Field(pattern=rf"^[./~]|{HUB_ID_PATTERN}")] | None,
    AfterValidator(folder_beside_recipe),
]
"""A folder (`./name`) or a Hugging Face id (`org/name`)."""
Name = Annotated[str, Field(min_length=1)]
Sources = Annotated[
    tuple[Name, ...],
    BeforeValidator(_as_sources),
    AfterValidator(_sources_beside_recipe),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""Data sources, given as a list or a single entry. Each is a file, a folder or a Hub dataset (hf:ORG/NAME)."""


def metric_beside_recipe(name: str | None, info: ValidationInfo) -> str | None:
    """If a metric is a function in a file (`FILE:FUNCTION`), resolve the file's path relative to the recipe's folder.
    Names of other metrics are returned unchanged.
    """
    spec = name and FunctionSpec.parse(name)
    return f"{beside_recipe(spec.path, info)}:{spec.function}" if spec else name


def _metrics_beside_recipe(names: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
    return names and tuple(metric_beside_recipe(name, info) or name for name in names)


ChatTemplate = Annotated[
    NamedTemplate | Path | None,
    BeforeValidator(_as_template),
    AfterValidator(beside_recipe),
    WithJsonSchema({"anyOf": [{"enum": list(NamedTemplate)}, {"type": "string", "format": "path"}, {"type": "null"}]}),
]
"""Name of a built-in chat template, or the path of a file ending in .jinja."""
Metrics = Annotated[
    tuple[Name, ...],
    BeforeValidator(_as_sources),
    AfterValidator(_metrics_beside_recipe),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""Names of metrics or metric functions (`./FILE.py:FUNCTION`), given as a list or a single entry."""
