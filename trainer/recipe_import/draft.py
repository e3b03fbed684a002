"""The recipe that an import builds, and the notes on what it could not carry over.

An importer takes the keys of the other tool's file one by one. A key that nobody has taken at the end is reported, so
that nothing is lost without a word.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

_OFF: tuple[Any, ...] = (None, False, "", [], {})
"""Values with which a key of another tool usually has no effect."""


class Effect(StrEnum):
    """What an import did with a key."""

    CHANGED = "changed"
    """It was imported, but does not mean exactly the same."""
    LEFT_OUT = "left out"
    """It was not imported, and training differs without it."""
    NOT_NEEDED = "not needed"
    """It was not imported, because the trainer decides this itself or has no use for it."""


@dataclass(frozen=True, slots=True)
class Note:
    """A key of the other tool that was not imported as it is.

    Attributes:
        key: key in the other tool's file.
        text: explanation, or an empty string if there is nothing to explain.
    """

    key: str
    effect: Effect
    text: str = ""


@dataclass(slots=True)
class Draft:
    """A recipe in the making.

    Args:
        content: the other tool's file. Keys that are taken are removed from it.

    Attributes:
        values: values of the recipe by dotted key.
        notes: what was not imported as it is.
    """

    content: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def take(self, key: str, default: Any = None) -> Any:
        """Remove a key from the other tool's file and return its value, or the default if it is missing or null."""
        value = self.content.pop(key, None)
        return default if value is None else value

    def copy(self, key: str, name: str, default: Any = None) -> None:
        """Import a key whose meaning is the same under another name. `default` is the other tool's default, if ours
        differs.
        """
        if (value := self.take(key, default)) is not None:
            self.values[name] = value

    def changed(self, key: str, text: str) -> None:
        """Note that a key was imported but does not mean exactly the same."""
        self.notes.append(Note(key, Effect.CHANGED, text))

    def leave_out(self, key: str, text: str) -> None:
        """Note that a key was not imported although training differs without it."""
        self.notes.append(Note(key, Effect.LEFT_OUT, text))

    def leave_out_if_set(self, key: str, text: str) -> None:
        """Take a key that cannot be imported, and note it if it has an effect."""
        if self.take(key) not in _OFF:
            self.leave_out(key, text)

    def finish(self, not_needed: Iterable[str]) -> None:
        """Report the keys that were not taken.

        Args:
            not_needed: keys that have no counterpart because the trainer needs none, or their beginning followed by
                an asterisk.
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
