"""Detects which tool a config belongs to, imports it as a recipe, and writes the recipe as YAML."""

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from svc.errors import RecipeError
from svc.version import NAME_PATTERN
from trainer.recipe.file import make_recipe, read_content
from trainer.recipe.importers.axolotl_and_llama_factory import NOT_NEEDED, RULES, TOOLS
from trainer.recipe.importers.draft import Draft, Effect, Note
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
    content = read_content(path, "config")
    tool = next((tool for key, tool in TOOLS.items() if key in content), None)
    if not tool:
        raise RecipeError(
            f"{path} is not an Axolotl or LLaMA-Factory config",
            expected="a YAML file with base_model (Axolotl) or model_name_or_path (LLaMA-Factory)",
        )
    draft = Draft(content, tool, folder.absolute(), path.absolute().parent, {"name": name or _name(path.stem)})
    draft.apply(RULES, NOT_NEEDED)
    if "data.train" not in draft.values:
        raise RecipeError("the config names no datasets", expected="paths in `datasets`, or names in `dataset`")
    nested = _nested(draft.values)
    try:
        make_recipe(nested, (), draft.folder, "")
        refused = None
    except RecipeError as error:
        refused = error.wrong.removeprefix(": ")
    return ImportedRecipe(tool.name, nested, tuple(draft.notes), refused)


def _name(stem: str) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("._-")[:63]
    return name if re.fullmatch(NAME_PATTERN, name) else "imported"


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """Nest a flat dictionary, whose keys are dotted, into sections in the order of the recipe's keys."""
    content: dict[str, Any] = {}
    for key, value in values.items():
        section, _, last = key.rpartition(".")
        plain = value.value if isinstance(value, Enum) else value
        (content.setdefault(section, {}) if section else content)[last] = plain
    order = list(Recipe.model_fields)
    return dict(sorted(content.items(), key=lambda item: order.index(item[0])))
