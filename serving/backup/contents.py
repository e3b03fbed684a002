"""Copies of clients' files in a backup. A client's file never changes, so all snapshots share one copy."""

import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter

from serving.backup.copying import OnBytes, copy_file
from serving.files.rows import FileContent
from svc.errors import IntegrityError
from svc.registry.files import record_file

_CONTENTS = TypeAdapter(tuple[FileContent, ...])


def dump_contents(contents: Iterable[FileContent]) -> bytes:
    """Serialize the list of a snapshot's client files to JSON."""
    return _CONTENTS.dump_json(tuple(contents))


def load_contents(path: Path) -> tuple[FileContent, ...]:
    """Return the entries of a snapshot's contents file. The result is empty if the file does not exist.

    Raises:
        ValueError: the file is damaged.
    """
    return _CONTENTS.validate_json(path.read_bytes()) if path.exists() else ()


def has_content(path: Path, content: FileContent, *, verify: bool = False) -> bool:
    """Return whether a file has the size recorded for its contents.

    Args:
        verify: whether to also check its hash.
    """
    if not path.is_file() or path.stat().st_size != content.bytes:
        return False
    return not verify or record_file(path.parent, path).sha256 == content.sha256


def copy_content(source: Path, target: Path, content: FileContent, on_bytes: OnBytes) -> None:
    """Copy a file's contents so that only the copy's owner can read them, and verify the copy.

    Raises:
        FileNotFoundError: there is no such file.
        IntegrityError: the file does not match its hash.
    """
    staging = target.with_name(f".{target.name}")
    try:
        copy_file(source, staging, on_bytes)
        staging.chmod(0o600)
        if not has_content(staging, content, verify=True):
            raise IntegrityError(f"{source} does not match its hash", todo="restore it from an older snapshot")
        os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)
