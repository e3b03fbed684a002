"""Lists the keys that a file may set, based on the pydantic model that validates the file."""

from pydantic import BaseModel


def dotted_keys(model: type[BaseModel]) -> list[str]:
    """Return every key of a pydantic model. Keys in sections are written as `section.key`."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            keys += [f"{name}.{inner}" for inner in section.model_fields]
        else:
            keys.append(name)
    return keys
