"""Lists the keys allowed in a file, based on the pydantic model that validates the file."""

import difflib
from collections.abc import Sequence

from pydantic import BaseModel


def dotted_keys(model: type[BaseModel]) -> list[str]:
    """Return every key of a pydantic model. Nested keys are written as `section.key`."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{inner}" for inner in section.model_fields]
        else:
            keys.append(name)
    return keys


def suggest(key: str, known: Sequence[str]) -> str:
    """Return a "did you mean" question that names the most similar known key. If no key is similar, return an
    empty string.
    """
    close = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
