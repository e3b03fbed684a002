"""The engine of an import: it builds a recipe by applying one rule to each key of another tool's config.

A key without a rule is reported, so that no key is lost silently.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from svc.dataset.schema.objective import Objective
from trainer.recipe.adapter import Method
from trainer.recipe.preference import PREFERENCE_KEYS
from trainer.recipe.recipe import Recipe

_OFF: tuple[Any, ...] = (None, False, "", [], {})
"""Values of a key in another tool's config that usually mean that the option is off."""


class Effect(StrEnum):
    """How an import handled a key."""

    CHANGED = "changed"
    """The key was imported, but does not mean exactly the same thing as in the other tool."""
    LEFT_OUT = "left out"
    """The key was not imported, and training differs without it."""
    NOT_NEEDED = "not needed"
    """The key was not imported, because the trainer chooses the value itself or has no use for it."""


@dataclass(frozen=True, slots=True)
class Note:
    """A key of the other tool that was left out or has a slightly different meaning here.

    Attributes:
        key: key in the other tool's config.
        text: explanation, or an empty string if there is nothing to explain.
    """

    key: str
    effect: Effect
    text: str = ""


Convert = Callable[["Draft", str, Any], Any]
"""Makes the recipe's value from a key and its value in the other tool's config. For a value that is not imported, it
returns None, and adds a note if necessary."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How to import a key. The texts may contain `{}` for the key's value and `{to}` for the key in the recipe.

    Attributes:
        keys: names of the key in the other tools.
        to: dotted key in the recipe. A key that only a converter or a note handles has none.
        convert: converter of the value; by default, the value is copied.
        changed: how the key's meaning differs here.
        left_out: reason why the key or, if `to` is set, an invalid value cannot be imported. The default for values is
            the recipe's own message.
    """

    keys: tuple[str, ...]
    to: str = ""
    convert: Convert | None = None
    changed: str = ""
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """Another tool whose configs can be imported.

    Attributes:
        defaults: its default values that differ from ours, by key.
    """

    name: str
    defaults: Mapping[str, Any]


@dataclass(slots=True)
class Draft:
    """A recipe that is being built.

    Args:
        content: contents of the other tool's config, from which `take` removes keys.
        folder: folder of the new recipe.
        origin: folder of the other tool's config.

    Attributes:
        values: values of the recipe by dotted key.
        notes: notes on keys that were left out or have a slightly different meaning here.
    """

    content: dict[str, Any]
    tool: Tool
    folder: Path
    origin: Path
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    @property
    def objective(self) -> Objective:
        """The recipe's objective, as far as it has been imported."""
        return Objective(self.values.get("objective", Objective.SFT))

    def take(self, key: str, default: Any = None) -> Any:
        """Remove a key from the other tool's config and return its value, or the default if the key is missing or its
        value is null.
        """
        value = self.content.pop(key, None)
        return default if value is None else value

    def changed(self, key: str, text: str) -> None:
        """Add a note that a key was imported although its meaning differs slightly."""
        self.notes.append(Note(key, Effect.CHANGED, text))

    def leave_out(self, key: str, text: str) -> None:
        """Add a note that a key was not imported, although it would affect training."""
        self.notes.append(Note(key, Effect.LEFT_OUT, text))

    def apply(self, rules: Sequence[Rule], not_needed: Sequence[str]) -> None:
        """Import the other tool's config.

        Args:
            rules: rules in the order of their application.
            not_needed: patterns of keys that the trainer does not need.
        """
        for rule in rules:
            for key in rule.keys:
                self._apply(key, rule)
        for key, value in self.content.items():
            if value not in _OFF:
                unneeded = any(fnmatch(key, pattern) for pattern in not_needed)
                self.notes.append(Note(key, Effect.NOT_NEEDED if unneeded else Effect.LEFT_OUT))

    def _apply(self, key: str, rule: Rule) -> None:
        given = self.take(key)
        value = self.tool.defaults.get(key) if given is None else given
        if value is None or (not rule.to and value in _OFF):
            return
        if self._ignores(rule.to):
            if given not in _OFF:
                self.notes.append(Note(key, Effect.NOT_NEEDED))
            return
        ours = rule.convert(self, key, value) if rule.convert else value
        if ours is None:
            return
        invalid = rule.to and _invalid(rule.to, ours)
        if invalid or (rule.left_out and not rule.to):
            self.leave_out(key, rule.left_out.format(value, to=rule.to) or invalid)
            return
        if rule.to:
            self.values[rule.to] = ours
        if rule.changed:
            self.changed(key, rule.changed.format(value))

    def _ignores(self, name: str) -> bool:
        """Return whether neither tool uses a key of the recipe with the chosen method and objective."""
        section, _, last = name.rpartition(".")
        if section == "preference":
            return last not in PREFERENCE_KEYS[self.objective]
        if name in ("train.too_long", "chat_template"):  # documents are cut, and have no turns
            return self.objective is Objective.TEXT
        return self.values.get("method") == Method.FULL and (section == "adapter" or last == "lora_plus_ratio")


def _invalid(name: str, value: Any) -> str:
    """Return why a key of the recipe does not accept a value, or an empty string if it does."""
    section, _, key = name.partition(".")
    try:
        TypeAdapter(Recipe.model_fields[section].rebuild_annotation()).validate_python({key: value} if key else value)
    except ValidationError as error:
        return f"{name} cannot be {value!r}: {error.errors()[0]['msg']}"
    return ""
