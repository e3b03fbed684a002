"""Extracts the language model from a checkpoint that also accepts images.

The language model's config and weights are written to a cache folder, so that all later stages see an ordinary
text-only base. The language model's tensors are copied unchanged under new names; all other tensors are omitted.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from svc.errors import BaseModelError, DiskSpaceError
from svc.model_folder.weight_files import WEIGHTS_INDEX, weight_files
from svc.registry.files import read_headers
from svc.terminal import waiting
from trainer.base_model.cached_folder import build_once
from trainer.base_model.checks import is_text_only, read_json, text_architecture
from trainer.base_model.content import CONFIG_FILE, SHIPPED_FILES

_RENAMED = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}
"""Prefixes of the language model's tensor names, mapped to the new prefixes. They cover both the published names and
the names that transformers has written since 4.52."""
_LEFT_OUT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_OF_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype")
"""Keys that belong to the language model, although some configs contain them only at the top level."""
_SHIPPED = (*SHIPPED_FILES, "README.md")


def language_model(folder: Path, cache: Path, revision: str | None) -> Path:
    """Return a folder that contains only a checkpoint's language model. If the checkpoint contains nothing
    else, its own folder is returned.

    Args:
        cache: folder for converted models; any number of processes may share it.
        revision: identifier of the checkpoint's content, or None if only the config and tokenizer are
            needed.

    Raises:
        BaseModelError: the language model of this model family cannot be used on its own.
        DiskSpaceError: the cache does not have enough free space.
        IntegrityError: a weight file is damaged.
    """
    config = read_json(folder / CONFIG_FILE)
    if is_text_only(config):
        return folder
    text = _text_config(folder, config)
    links = [path for name in _SHIPPED if (path := folder.absolute() / name).is_file()]
    digest = hashlib.sha256(json.dumps([text, revision, list(map(str, links))]).encode()).hexdigest()
    return build_once(cache / "language_models" / digest[:32], partial(_write, folder, text, links, revision))


def _text_config(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the language model's config.json as text."""
    architecture = text_architecture(folder, config)
    text = config["text_config"] | {"architectures": [architecture]}
    text |= {key: config[key] for key in _OF_WHOLE if key in config and key not in text}
    return json.dumps(text, indent=2, ensure_ascii=False) + "\n"


def _write(folder: Path, config: str, links: list[Path], revision: str | None, out: Path) -> None:
    (out / CONFIG_FILE).write_text(config, "utf-8")
    for link in links:
        (out / link.name).symlink_to(link)
    if revision is not None:
        with waiting(f"Copying the language model of {folder.name}"):
            _write_weights(folder, out)


def _write_weights(folder: Path, out: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    names = {tensor.name: _renamed(folder, tensor.name) for tensor in read_headers(folder)}
    files = weight_files(folder)
    need, free = sum(path.stat().st_size for path in files), shutil.disk_usage(out).free
    if free < need:
        raise DiskSpaceError(
            f"extracting the language model of {folder} needs up to {need / 1e6:.0f} MB in {out.parent}, but only "
            f"{free / 1e6:.0f} MB are free",
            todo=f"free up {(need - free) / 1e6:.0f} MB or set base_cache to a folder on another disk",
        )
    weight_map: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:  # maps the file: copying takes no memory with 0.8
            kept = {name: old for old in file.keys() if (name := names[old])}  # noqa: SIM118 - no mapping
            tensors = {name: file.get_tensor(old) for name, old in kept.items()}
            if tensors:
                save_file(tensors, out / path.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    if (folder / WEIGHTS_INDEX).is_file():
        index = {"metadata": {}, "weight_map": weight_map}
        (out / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _renamed(folder: Path, name: str) -> str | None:
    """Return a tensor's name within the language model, or None if the tensor is not part of it."""
    if name.startswith(_LEFT_OUT):
        return None
    for old, new in _RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise BaseModelError(
        f"{folder} contains tensor {name!r}, and it is unclear whether it belongs to the language model",
        expected=f"tensor names that begin with {', '.join((*_RENAMED, *_LEFT_OUT))}",
        todo="use the publisher's unmodified checkpoint, or choose another base",
    )
