"""Checks that a model folder has the same files as its base, apart from the weights, and that its weight
files are complete.

The tokenizer, chat template and generation config are compared byte for byte. A model served with a
different tokenization answers differently, and no other check would show it. Of the weights, only names
and sizes are read.
"""

from pathlib import Path
from typing import Any

from svc.errors import BaseModelError, IntegrityError
from svc.registry.files import read_headers
from trainer.base_model.content import SHIPPED_FILES, TEMPLATE_FILE, pinned_template
from trainer.model.config import load_config

_MAY_DIFFER = {"_name_or_path", "quantization_config", "transformers_version"}
"""Config keys that describe where and how weights are stored and do not affect the computation."""


def other_files(base: Path, folder: Path) -> list[str]:
    """Return the names of the files, other than weights and config.json, whose contents differ from the base's."""
    shipped = {name: _content(base / name) for name in SHIPPED_FILES}
    if pinned := pinned_template(base):
        shipped[TEMPLATE_FILE] = pinned.encode("utf-8")
    return [name for name, content in shipped.items() if content != _content(folder / name)]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def other_config(base: Path, folder: Path) -> list[str]:
    """Return the keys of a folder's config whose meaning differs from the base's.

    Both configs are read with the engine's version of transformers, which fills in defaults and treats
    `rope_theta` and `rope_parameters` as equivalent.

    Raises:
        BaseModelError: transformers cannot read the base's config.
    """
    before = load_config(base).to_dict() | {"dtype": "bfloat16"}  # the type of all written weights
    try:
        after = load_config(folder).to_dict()
    except BaseModelError:  # a config with impossible values, such as a width that the heads do not divide
        return ["all keys, because transformers cannot read the config"]
    return sorted(key for key in {*before, *after} - _MAY_DIFFER if _plain(before.get(key)) != _plain(after.get(key)))


def _plain(value: Any) -> Any:
    """Return a config value without the keys in `_MAY_DIFFER`, including in nested configs."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if key not in _MAY_DIFFER}
    return value


def unreadable_weights(folder: Path) -> str | None:
    """Return a description of what is wrong with the weight files, or None if they are complete."""
    try:
        read_headers(folder)
    except IntegrityError as error:
        return error.wrong
    return None
