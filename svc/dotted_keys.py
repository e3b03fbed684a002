"""Lists the keys allowed in a file, based on the pydantic model that validates it."""

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
