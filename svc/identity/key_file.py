"""The file from which a command takes its key: never the command line, which everybody on a machine can read."""

import os
import stat
from pathlib import Path

from svc.errors import SettingsError
from svc.identity.key_secret import key_id_of


def read_key(path: Path) -> str:
    """The key of this service in a file.

    Raises:
        SettingsError: it cannot be read, others can read it too, or it holds no secret.
    """
    secret = read_secret(path, "svc keys rotate")
    if key_id_of(secret) is None:
        raise SettingsError(
            f"the key file {path} holds no key of this service", expected="what `svc keys create` has printed"
        )
    return secret


def read_secret(path: Path, renew: str) -> str:
    """The key in a file, of whatever service.

    Args:
        renew: what to do where others may have it.

    Raises:
        SettingsError: it cannot be read, others can read it too, or it is empty.
    """
    try:
        with path.open(encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            secret = file.read(1024).strip()
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"the key file {path} cannot be read: {error}", expected="a file that holds the key"
        ) from error
    if mode & 0o077:
        raise SettingsError(
            f"others can read the key file {path} (mode {mode:04o})",
            expected="a file that only its owner can read",
            todo=f"chmod 600 {path}; who may have read it, has it: {renew}",
        )
    if not secret:
        raise SettingsError(f"the key file {path} holds no key", expected="a file that holds the key")
    return secret
