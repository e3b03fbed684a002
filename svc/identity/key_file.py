"""Reads keys from files. Commands do not accept a key as an argument, because any local user can see a
process's arguments.
"""

import os
import stat
from pathlib import Path

from svc.errors import SettingsError
from svc.identity.key_secret import key_id_of


def read_key(path: Path) -> str:
    """Read an API key for this service from a file.

    Raises:
        SettingsError: the file cannot be read, is readable by other users, or contains no secret.
    """
    secret = read_secret(path, "svc keys rotate")
    if key_id_of(secret) is None:
        raise SettingsError(
            f"the key file {path} contains no API key for this service",
            expected="the secret that `svc keys create` printed",
        )
    return secret


def read_secret(path: Path, renew: str) -> str:
    """Read an API key for any service from a file.

    Args:
        renew: instruction for replacing a key that other users may have copied.

    Raises:
        SettingsError: the file cannot be read, is readable by other users, or is empty.
    """
    try:
        with path.open(encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            secret = file.read(1024).strip()
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"cannot read the key file {path}: {error}", expected="a file that contains the key"
        ) from error
    if mode & 0o077:
        raise SettingsError(
            f"the key file {path} can be read by other users (mode {mode:04o})",
            expected="a file that only its owner can read",
            todo=f"chmod 600 {path}; anyone who could read the file may have copied the key: {renew}",
        )
    if not secret:
        raise SettingsError(f"the key file {path} is empty", expected="a file that contains the key")
    return secret
