"""Folders for an engine's socket, lock and record.

The socket's folder has owner-only permissions and a short path. The lock and the record are in the home,
where the next server finds them.
"""

import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from svc.errors import EngineError

_STATES = "engines"


def runtime_folder(home: Path, purpose: str) -> Path:
    """Create or check the folder for one engine of one home, and return its path.

    A Unix socket's path has at most 107 characters, and a home's path may be long, so the folder gets a
    short name under the folder for temporary files. `$XDG_RUNTIME_DIR` is not used, because it is deleted
    when its user logs out, which a server may outlive.

    Args:
        purpose: distinguishes the folders of a home's engines; each is used by one engine at a time.

    Raises:
        EngineError: the folder belongs to another user, or other users can access it.
    """
    parent = Path(tempfile.gettempdir())
    digest = hashlib.sha256(f"{home.resolve()}\0{purpose}".encode()).hexdigest()[:12]
    folder = parent / f"tuneserve-{os.getuid()}-{digest}"
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError as error:
        raise EngineError(
            f"cannot create {folder}: {error.strerror}",
            expected=f"write access to {parent} for this user",
            todo=f"create {parent}, or set TMPDIR to another folder",
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise EngineError(
            f"{folder} is not a private folder of this user",
            expected="a folder with mode 0700, owned by this user",
            todo=f"check who created the folder, then remove it: rm -r {folder}",
        )
    return folder


def socket_folder(home: Path, replica: int) -> Path:
    """Return the folder for the socket of one of the server's engines.

    Raises:
        EngineError: see `runtime_folder`.
    """
    return runtime_folder(home, f"serve-{replica}")


def state_folder(home: Path, replica: int) -> Path:
    """Return the folder for the lock and record of one of the server's engines, creating it if missing."""
    folder = home / _STATES / str(replica)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def state_folders(home: Path) -> dict[int, Path]:
    """Return the existing state folders, keyed by replica."""
    folders = (home / _STATES).iterdir() if (home / _STATES).is_dir() else iter(())
    return dict(sorted((int(folder.name), folder) for folder in folders if folder.name.isdecimal()))
