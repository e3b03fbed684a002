"""Adds tokens to a base model's tokenizer and embeddings, in a new folder that links to the base's other files.

All later stages, including the engine, see an ordinary base with these tokens.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from svc.errors import BaseModelError, RecipeError
from svc.model_folder.weight_files import WEIGHTS_INDEX, weight_files
from svc.terminal import waiting
from trainer.base_model.cached_folder import build_once
from trainer.base_model.checks import read_json
from trainer.base_model.content import CONFIG_FILE, SHIPPED_FILES

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
"""Suffixes of the names of the weight matrices that have one row per token."""
_NOT_OF_TOKENIZER = ("generation_config.json", "chat_template.json")
"""Files in `SHIPPED_FILES` that are linked from the base's folder, because saving the tokenizer does not write them."""


def revision_with_tokens(revision: str, tokens: Sequence[str]) -> str:
    """Return the revision of a base with added tokens: the base's revision plus a hash of the tokens."""
    return f"{revision}+tokens:{hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()}"


def folder_with_tokens(folder: Path, tokens: Sequence[str], cache: Path) -> Path:
    """Return a cache folder that links to a model's files, but has a tokenizer and embeddings with added tokens.

    A new token's embedding is initialized to the mean embedding of the tokens into which the base's tokenizer splits
    the new token's text. Existing embeddings and ids do not change. The new tokens are not special: an engine does not
    remove them from answers.

    Args:
        folder: folder of the model. If it contains no weights, only the config and the tokenizer are changed.
        cache: folder for converted models; any number of processes may share it.

    Raises:
        RecipeError: the tokenizer already has one of the tokens.
        BaseModelError: the model's embeddings have unusual names.
    """
    files = sorted(str(path) for path in folder.absolute().iterdir() if path.is_file())
    digest = hashlib.sha256(json.dumps([list(tokens), files]).encode()).hexdigest()
    with waiting("Adding tokens to the base model"):
        return build_once(cache / "more_tokens" / digest[:32], partial(_build, folder.absolute(), tokens))


def _build(folder: Path, tokens: Sequence[str], out: Path) -> None:
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if known := [token for token in tokens if token in tokenizer.get_vocab()]:
        raise RecipeError(f"new_tokens lists {known[0]!r}, which the tokenizer already has", todo="remove it")
    pieces = {token: tokenizer(token, add_special_tokens=False).input_ids for token in tokens}
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    tokenizer.save_pretrained(out)
    rows = {tokenizer.convert_tokens_to_ids(token): ids for token, ids in pieces.items()}
    config = read_json(folder / CONFIG_FILE)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    size = text["vocab_size"] = max(text["vocab_size"], max(rows) + 1)
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    _write_rows(folder, rows, size, out)
    for path in folder.iterdir():
        of_tokenizer = path.name in SHIPPED_FILES and path.name not in _NOT_OF_TOKENIZER
        if path.is_file() and not of_tokenizer and not (out / path.name).exists():
            (out / path.name).symlink_to(path)


def _write_rows(folder: Path, rows: Mapping[int, list[int]], size: int, out: Path) -> None:
    """Write copies of the weight files that contain embeddings, with a row added for each new token.

    Args:
        rows: for each new token's id, the ids of the existing tokens whose embeddings are averaged.
        size: number of rows that the embeddings need.
        out: folder to write to.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    changed, paths = False, weight_files(folder)
    for path in paths:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(_EMBEDDINGS)]  # noqa: SIM118 - not a mapping
            if names:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                tensors |= {name: _with_rows(tensors[name], rows, size) for name in names}
                save_file(tensors, out / path.name, file.metadata())
                changed = True
    if paths and not changed:
        raise BaseModelError(
            f"{folder} has no tensor named {' or '.join(_EMBEDDINGS)}, to which rows for new tokens could be added",
            todo="remove new_tokens from the recipe, or choose another base",
        )
    if (folder / WEIGHTS_INDEX).is_file():
        shutil.copyfile(folder / WEIGHTS_INDEX, out / WEIGHTS_INDEX)


def _with_rows(matrix: "Tensor", rows: Mapping[int, list[int]], size: int) -> "Tensor":
    larger = matrix.new_zeros(max(size, len(matrix)), matrix.shape[1])
    larger[: len(matrix)] = matrix
    for row, pieces in rows.items():
        larger[row] = matrix[pieces].float().mean(dim=0).to(matrix.dtype)
    return larger
