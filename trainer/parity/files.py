"""Whether a model folder has what its base has beside the weights, and weights that can be read whole.

Tokenizer, chat template and generation config byte for byte: a served model that tokenizes otherwise answers otherwise,
and nothing else shows it. Reads no weights but their names and sizes.
"""

from pathlib import Path
from typing import Any

from svc.errors import BaseModelError, IntegrityError
from svc.registry.files import read_headers
from trainer.base_model.content import SHIPPED_FILES, TEMPLATE_FILE, pinned_template
from trainer.model.config import load_config

_MAY_DIFFER = {"_name_or_path", "quantization_config", "transformers_version"}
"""Keys of a config that say where weights are and how they are packed, and not what they compute."""


def other_files(base: Path, folder: Path) -> list[str]:
    """Names of the files, of those that a model ships beside its weights, that are not the base's byte for byte."""
    shipped = {name: _content(base / name) for name in SHIPPED_FILES}
    if pinned := pinned_template(base):
        shipped[TEMPLATE_FILE] = pinned.encode("utf-8")
    return [name for name, content in shipped.items() if content != _content(folder / name)]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def other_config(base: Path, folder: Path) -> list[str]:
    """Return the keys of a folder's config whose meaning is not that of the base's.

    Both are read by the same transformers, which the engine has too: it fills in defaults, and knows that `rope_theta`
    and `rope_parameters` are one thing.

    Raises:
        BaseModelError: transformers cannot read the base's config.
    """
    before = load_config(base).to_dict() | {"dtype": "bfloat16"}  # in which all weights are written
    try:
        after = load_config(folder).to_dict()
    except BaseModelError:  # a config with impossible values, as a width that the heads do not divide
        return ["all keys: transformers cannot read it"]
    return sorted(key for key in {*before, *after} - _MAY_DIFFER if _plain(before.get(key)) != _plain(after.get(key)))


def _plain(value: Any) -> Any:
    """Without what may differ further inside, as in a config that holds another."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if key not in _MAY_DIFFER}
    return value


def unreadable_weights(folder: Path) -> str | None:
    """What is wrong with the files of weights; None where they are whole."""
    try:
        read_headers(folder)
    except IntegrityError as error:
        return error.wrong
    return None
