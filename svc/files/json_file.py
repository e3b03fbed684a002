"""Reads files that contain one JSON object, or one per line. Errors name the file and the line."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from svc.errors import IntegrityError

_Record = TypeVar("_Record", bound=BaseModel)
_TODO = "restore the file from a backup, or train again"
"""Advice to the user if a file that is stored with a version is damaged."""


def read_json_object(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        default: value to return if the file is missing, or None to raise an error.

    Raises:
        IntegrityError: the file is missing or damaged.
    """
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        expected = "a JSON file of a complete model folder"
        raise IntegrityError(f"cannot read {path}: {error}", expected=expected) from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} must contain a JSON object, got {type(content).__name__}")
    return content


def read_record(path: Path, kind: type[_Record]) -> _Record:
    """Read a record that was written to one of a version's files with `model_dump_json`.

    Raises:
        IntegrityError: the file is missing or does not contain a valid record.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise IntegrityError(f"cannot read {path}: {error}", todo=_TODO) from error


def read_records(path: Path, kind: type[_Record], what: str) -> tuple[_Record, ...]:
    """Read the records in a file, one per line.

    Args:
        what: noun for a record, used in error messages.

    Raises:
        IntegrityError: the file is missing, or a line does not contain a valid record.
    """
    try:
        lines = path.read_bytes().splitlines()  # of bytes: U+2028 is valid JSON and not a line end
    except OSError as error:
        raise IntegrityError(f"cannot read {path}: {error}", todo=_TODO) from error
    return tuple(_line(path, number, line, kind, what) for number, line in enumerate(lines, start=1))


def _line(path: Path, number: int, line: bytes, kind: type[_Record], what: str) -> _Record:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        raise IntegrityError(f"{path}:{number} is not a {what}: {error}", todo=_TODO) from error
