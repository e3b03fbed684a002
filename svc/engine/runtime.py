"""The private folder for an engine's socket: short enough for a unix socket, and closed to every other user."""

import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from svc.errors import EngineError


def runtime_folder(home: Path, purpose: str) -> Path:
    """Creates or checks the folder for one engine of one home.

    A unix socket's path has at most 107 characters, and homes lie deep; so the folder is a short name under
    `$XDG_RUNTIME_DIR` or the folder for temporary files.

    Args:
        purpose: one engine at a time for each purpose.

    Raises:
        EngineError: the folder belongs to somebody else, or is open to others.
    """
    parent = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    digest = hashlib.sha256(f"{home.resolve()}\0{purpose}".encode()).hexdigest()[:12]
    folder = parent / f"tuneserve-{os.getuid()}-{digest}"
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError as error:
        raise EngineError(
            f"cannot make {folder}: {error.strerror}",
            expected=f"a folder {parent} that this user can write",
            todo="create it, or unset XDG_RUNTIME_DIR",
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise EngineError(
            f"{folder} is not a private folder of this user",
            expected="a folder with mode 0700, owned by this user",
            todo=f"look who made it, then remove it: rm -r {folder}",
        )
    return folder
