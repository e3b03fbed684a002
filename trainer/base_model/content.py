"""Identifies a base model's files by a hash of their contents, and reads the model's license."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svc.files.json_file import read_json_object
from svc.model_folder.chat_template import pin_date, read_chat_template
from svc.model_folder.weight_files import weight_files
from svc.terminal import waiting

CONFIG_FILE, TEMPLATE_FILE = "config.json", "chat_template.jinja"
SHIPPED_FILES = (
    "added_tokens.json",
    TEMPLATE_FILE,
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Model files other than weights and config. They are copied byte for byte into models derived from the base, except
for a chat template that renders today's date."""
_HASHED = (".json", ".jinja", ".model", ".txt")


def read_licence(folder: Path) -> str | None:
    """Return the license stated in the header of the model card."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    from huggingface_hub import metadata_load

    licence = (metadata_load(card) or {}).get("license")
    return str(licence) if licence else None


def model_files(folder: Path) -> list[Path]:
    """Return the files that define a model: weights, configs, tokenizer and templates."""
    others = (file for file in folder.iterdir() if file.suffix in _HASHED and file.is_file())
    return sorted([*weight_files(folder), *others])


def copy_shipped_files(model: Path, out: Path, quantization: Mapping[str, Any] | None = None) -> None:
    """Copy a model's config, tokenizer, chat template and generation config next to weights derived from it.

    If the target folder already contains one of these files but the model does not, the file is deleted from the target
    folder.

    Args:
        out: folder of the derived weights, which are in bf16 unless they are quantized.
        quantization: quantization config of the weights, or None if they are not quantized.
    """
    _write_config(model, out, quantization)
    for name in SHIPPED_FILES:
        (out / name).unlink(missing_ok=True)
        if (model / name).is_file():
            shutil.copyfile(model / name, out / name)
    if pinned := pinned_template(model):
        (out / TEMPLATE_FILE).write_text(pinned, "utf-8")


def _write_config(model: Path, out: Path, quantization: Mapping[str, Any] | None) -> None:
    """Write the model's own config.json, updated with the dtype and quantization of the weights in `out`.

    The config that transformers saves is not used: transformers renames keys (`rope_theta` to `rope_parameters`) and
    adds defaults, and TRL and gptqmodel change the config while they work.
    """
    config = read_json_object(model / CONFIG_FILE)
    changed: dict[str, Any] = {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in config}
    changed = changed or {"torch_dtype": "bfloat16"}
    if quantization is not None:
        changed["quantization_config"] = quantization
    if config == config | changed:
        shutil.copyfile(model / CONFIG_FILE, out / CONFIG_FILE)
    else:
        (out / CONFIG_FILE).write_text(json.dumps(config | changed, indent=2, ensure_ascii=False) + "\n", "utf-8")


def pinned_template(model: Path) -> str | None:
    """Return a replacement for the model's chat template if it renders today's date, or None if it does not."""
    template = read_chat_template(model) or ""
    pinned = pin_date(template)
    return pinned if pinned != template else None


def hash_files(files: list[Path], what: str = "the base model") -> str:
    """Return a SHA-256 hash of one or more files. A single file is hashed by its contents only; for several files, the
    hash also covers their names and sizes.

    Args:
        what: description of the files for the progress message, such as `the base model`.
    """
    digest = hashlib.sha256()
    with waiting(f"Hashing {what}"):
        for file in files:
            if len(files) > 1:
                digest.update(f"\x1f{file.name}\x1f{file.stat().st_size}\x1f".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return f"sha256:{digest.hexdigest()}"
