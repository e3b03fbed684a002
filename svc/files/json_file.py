"""A file that holds one JSON object, or one in each line; or an error that names it, and the line."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from svc.errors import IntegrityError

_Record = TypeVar("_Record", bound=BaseModel)
_TODO = "restore it from a backup, or train again"
"""Of what is kept with a version."""


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


def read_record(path: Path, kind: type[_Record]) -> _Record:
    """What `model_dump_json` of a kind wrote, of what is kept with a version.

    Raises:
        IntegrityError: there is no such file, or it holds none.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise IntegrityError(f"cannot read {path}: {error}", todo=_TODO) from error


def read_records(path: Path, kind: type[_Record], what: str) -> tuple[_Record, ...]:
    """One in each line, likewise.

    Args:
        what: each is, for the error.

    Raises:
        IntegrityError: there is no such file, or a line of it holds none.
    """
    try:
        lines = path.read_bytes().splitlines()  # of bytes: U+2028 is good JSON and ends no line
    except OSError as error:
        raise IntegrityError(f"cannot read {path}: {error}", todo=_TODO) from error
    return tuple(_line(path, number, line, kind, what) for number, line in enumerate(lines, start=1))


def _line(path: Path, number: int, line: bytes, kind: type[_Record], what: str) -> _Record:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        raise IntegrityError(f"{path}:{number} is no {what}: {error}", todo=_TODO) from error
