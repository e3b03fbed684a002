"""Where an engine's socket, lock and record are.

The socket's folder is private and has a short path. Lock and record are in the home, where whoever serves
on it next finds them.
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
    """Creates or checks the folder for one engine of one home.

    A unix socket's path has at most 107 characters, and homes lie deep; so the folder is a short name under the folder
    for temporary files. `$XDG_RUNTIME_DIR` goes when its user logs out, and a server need not.

    Args:
        purpose: one engine at a time for each purpose.

    Raises:
        EngineError: the folder belongs to somebody else, or is open to others.
    """
    parent = Path(tempfile.gettempdir())
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
            todo="create it, or set TMPDIR to another",
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise EngineError(
            f"{folder} is not a private folder of this user",
            expected="a folder with mode 0700, owned by this user",
            todo=f"look who made it, then remove it: rm -r {folder}",
        )
    return folder


def socket_folder(home: Path, replica: int) -> Path:
    """The folder for the socket of one of a server's engines.

    Raises:
        EngineError: see `runtime_folder`.
    """
    return runtime_folder(home, f"serve-{replica}")


def state_folder(home: Path, replica: int) -> Path:
    """The folder for the lock and the record of one of a server's engines; made where it is not there."""
    folder = home / _STATES / str(replica)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def state_folders(home: Path) -> dict[int, Path]:
    """Those that there are, by replica."""
    folders = (home / _STATES).iterdir() if (home / _STATES).is_dir() else iter(())
    return dict(sorted((int(folder.name), folder) for folder in folders if folder.name.isdecimal()))
