"""The recipe that an import builds, and notes on keys that were left out or mean something slightly different.

An importer removes the keys of the other tool's config one by one. Keys that remain at the end are reported, so that no
key is lost silently.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

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


@dataclass(slots=True)
class Draft:
    """A recipe that is being built.

    Args:
        content: contents of the other tool's config, from which `take` removes keys.

    Attributes:
        values: values of the recipe by dotted key.
        notes: notes on keys that were left out or have a slightly different meaning here.
    """

    content: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def take(self, key: str, default: Any = None) -> Any:
        """Remove a key from the other tool's config and return its value, or the default if the key is missing or its
        value is null.
        """
        value = self.content.pop(key, None)
        return default if value is None else value

    def copy(self, key: str, name: str, default: Any = None) -> None:
        """Import a key that has the same meaning under a different name. `default` is the other tool's default, if it
        differs from ours.
        """
        if (value := self.take(key, default)) is not None:
            self.values[name] = value

    def changed(self, key: str, text: str) -> None:
        """Add a note that a key was imported although its meaning differs slightly."""
        self.notes.append(Note(key, Effect.CHANGED, text))

    def leave_out(self, key: str, text: str) -> None:
        """Add a note that a key was not imported, although it would affect training."""
        self.notes.append(Note(key, Effect.LEFT_OUT, text))

    def leave_out_if_set(self, key: str, text: str) -> None:
        """Remove a key that cannot be imported, and add a note if the key has an effect."""
        if self.take(key) not in _OFF:
            self.leave_out(key, text)

    def finish(self, not_needed: Iterable[str]) -> None:
        """Add notes on the keys that remain in the other tool's config.

        Args:
            not_needed: keys that the trainer does not need, given by name or as a prefix followed by an asterisk.
        """
        exact = {name for name in not_needed if not name.endswith("*")}
        prefixes = tuple(name[:-1] for name in not_needed if name.endswith("*"))
        for key, value in self.content.items():
            if value in _OFF:
                continue
            if key in exact or key.startswith(prefixes):
                self.notes.append(Note(key, Effect.NOT_NEEDED))
            else:
                self.notes.append(Note(key, Effect.LEFT_OUT))
