"""Detects which tool a config belongs to, imports it as a recipe, and writes the recipe as YAML."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from svc.errors import RecipeError
from svc.version import NAME_PATTERN
from svc.yaml_text import parse_yaml
from trainer.recipe.importers.axolotl import import_axolotl, is_axolotl
from trainer.recipe.importers.draft import Draft, Effect, Note
from trainer.recipe.importers.llama_factory import import_llama_factory, is_llama_factory
from trainer.recipe.recipe import Recipe

_HEADINGS = {
    Effect.CHANGED: "Check these keys, whose meaning differs slightly here:",
    Effect.LEFT_OUT: "Not imported; training differs without these keys:",
    Effect.NOT_NEEDED: "Not needed here:",
}


@dataclass(frozen=True, slots=True)
class ImportedRecipe:
    """A recipe that was imported from another tool.

    Attributes:
        tool: name of the other tool.
        content: the recipe, as nested sections.
        notes: keys of the other tool that were left out or have a slightly different meaning here.
        refused: reason why `svc train` would reject the recipe in its present form, or None if it would not.
    """

    tool: str
    content: dict[str, Any]
    notes: tuple[Note, ...]
    refused: str | None

    def note_lines(self) -> list[str]:
        """Return the notes as lines of text, grouped by how the import handled each key."""
        lines = [f"svc train would reject this recipe: {self.refused}"] if self.refused else []
        for effect, heading in _HEADINGS.items():
            notes = [note for note in self.notes if note.effect is effect]
            if notes and effect is Effect.NOT_NEEDED:
                lines.append(f"{heading} {', '.join(note.key for note in notes)}")
            elif notes:
                lines += [heading, *(f"  {note.key}: {note.text}" if note.text else f"  {note.key}" for note in notes)]
        return lines

    def text(self) -> str:
        """Return the recipe as YAML, with the notes as comments above it."""
        comments = [f"Imported from a config of {self.tool}.", *self.note_lines()]
        body = yaml.safe_dump(self.content, sort_keys=False, allow_unicode=True, width=100)
        return "".join(f"# {line}\n" for line in comments) + body


def import_recipe(path: Path, folder: Path, name: str | None = None) -> ImportedRecipe:
    """Import an Axolotl or LLaMA-Factory config.

    Args:
        folder: folder of the new recipe, to which its paths are relative.
        name: name of the model; by default, it is derived from the file's name.

    Raises:
        RecipeError: the file is not a config of one of these tools, or trains something that is not supported.
    """
    try:
        content = parse_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot open {path}: {error.strerror}", todo="check the path") from error
    except ValueError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}", expected="a YAML mapping in UTF-8") from error
    draft = Draft(dict(content) if isinstance(content, dict) else {})
    draft.values["name"] = name or _name(path.stem)
    if is_axolotl(draft.content):
        tool = "Axolotl"
        import_axolotl(draft, folder.absolute())
    elif is_llama_factory(draft.content):
        tool = "LLaMA-Factory"
        import_llama_factory(draft, folder.absolute(), path.absolute().parent)
    else:
        raise RecipeError(
            f"{path} is not an Axolotl or LLaMA-Factory config",
            expected="a YAML file with base_model (Axolotl) or model_name_or_path (LLaMA-Factory)",
        )
    nested = _nested(draft.values)
    try:
        Recipe.model_validate(nested, context={"folder": folder.absolute()})
        refused = None
    except ValidationError as error:
        refused = "; ".join(
            f"{'.'.join(map(str, problem['loc']))} {problem['msg']}".strip() for problem in error.errors()
        )
    return ImportedRecipe(tool, nested, tuple(draft.notes), refused)


def _name(stem: str) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("._-")[:63]
    return name if re.fullmatch(NAME_PATTERN, name) else "imported"


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """Nest a flat dictionary, whose keys are dotted, into sections in the order of the recipe's keys."""
    content: dict[str, Any] = {}
    for key, value in values.items():
        section, _, last = key.rpartition(".")
        (content.setdefault(section, {}) if section else content)[last] = value
    order = list(Recipe.model_fields)
    return dict(sorted(content.items(), key=lambda item: order.index(item[0])))
