"""Base class of all settings sections, and value types that several sections share."""

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


def absolute(path: Path) -> Path:
    """Convert a path relative to the working folder or to a user's home (`~USER`) to an absolute path.

    Raises:
        ValueError: the path begins with `~USER`, and there is no such user.
    """
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"there is no user {path.parts[0]} on this machine") from error


AbsolutePath = Annotated[Path, AfterValidator(absolute)]


def _network(text: str) -> str:
    return str(ipaddress.ip_network(text))


Network = Annotated[str, AfterValidator(_network)]


class Section(BaseModel):
    """A group of settings. Unknown keys are errors.

    The docstring of a setting is its description in docs/configuration.md (see docs/generate.py).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
