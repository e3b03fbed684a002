"""Builds API keys in the store of a home, and their files."""

from pathlib import Path
from typing import Any

from serving.access.keyring import IssuedKey, Keyring
from svc.identity.principal import Scope
from tests.builders.actors import ALICE
from tests.serving.home import Home


def make_key(home: Home, *scopes: Scope, **given: Any) -> IssuedKey:
    """Create a key, for inference unless other scopes are given.

    Args:
        given: further arguments of `Keyring.create`.
    """
    return Keyring(home.store, ALICE).create(frozenset(scopes or {Scope.INFER}), **given)


def write_key(folder: Path, issued: IssuedKey) -> Path:
    """Write a key's secret to a file that only its owner can read, and return its path."""
    path = folder / f"{issued.key.id}.key"
    path.touch(mode=0o600)
    path.write_text(issued.secret)
    return path
