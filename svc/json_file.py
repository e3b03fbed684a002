"""A file that holds one JSON object, or an error that names it."""

import json
from pathlib import Path
from typing import Any

from svc.errors import IntegrityError


def read_json_object(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file that holds one JSON object.

    Args:
        default: what stands for a file that is not there; None: it must be.

    Raises:
        IntegrityError: the file is missing or damaged.
    """
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"cannot read {path}: {error}", expected="a JSON file of a whole model folder") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} holds a {type(content).__name__}", expected="a JSON object")
    return content
