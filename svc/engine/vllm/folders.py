"""Creates and finds the folders for an engine's socket, lock and record.

The socket's folder has owner-only permissions and a short path. The lock and the record are stored in the home
directory, where the next server can find them.
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
    """Return the folder for an engine's socket, creating it if it does not exist.

    The path of a Unix socket is limited to 107 characters, but the home folder may have a long path. The folder
    is therefore created in the directory for temporary files, under a short name. `$XDG_RUNTIME_DIR` is not used,
    because it is deleted when the user logs out, while the server may keep running.

    Args:
        purpose: distinguishes the folders of a home folder's engines. Each folder is used by one engine at a time.

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
            f"{folder} is not owned by this user or is accessible to other users",
            expected="a folder with mode 0700, owned by this user",
            todo=f"check who created the folder, then remove it: rm -r {folder}",
        )
    return folder


def socket_folder(home: Path, replica: int) -> Path:
    """Return the folder for a replica's engine socket.

    Raises:
        EngineError: see `runtime_folder`.
    """
    return runtime_folder(home, f"serve-{replica}")


def state_folder(home: Path, replica: int) -> Path:
    """Return the folder for the lock and record of a replica's engine, creating it if it does not exist."""
    folder = all_states(home) / str(replica)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def all_states(home: Path) -> Path:
    """Return the parent folder of all replicas' state folders. It may not exist."""
    return home / _STATES


def state_folders(home: Path) -> dict[int, Path]:
    """Return the state folders that exist in a home folder, keyed by replica."""
    folders = all_states(home).iterdir() if all_states(home).is_dir() else iter(())
    return dict(sorted((int(folder.name), folder) for folder in folders if folder.name.isdecimal()))
