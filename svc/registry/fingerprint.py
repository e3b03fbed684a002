"""Version compatibility: one version can replace another in place only if their fingerprints are equal.

A reload replaces only tensors, so everything that vLLM reads once at startup must be the same:
architecture, shapes, quantization, tokenizer, chat template and its arguments, and sampling defaults.

A shared embedding matrix must be the same as well. If the output layer shares the input embedding, vLLM's CPU engine
keeps a packed copy of that matrix for the output layer, and a reload does not update the copy. Adapters do not change
the matrix, but full fine-tuning does.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from svc.errors import IntegrityError
from svc.files.json_file import read_json_object
from svc.model_folder.chat_template import TemplateKwargs, read_chat_template, read_template_kwargs
from svc.model_folder.weight_files import TOKENIZER_FILES
from svc.registry.files import hash_tensor, read_headers, record_file

# Written by the library that saved the file; not properties of the model.
_VOLATILE = {"transformers_version", "use_cache", "quantization_config", "name_or_path"}

# The fields of a quantization that determine kernel and layout, with their defaults. All others, mainly `meta`, are
# bookkeeping of the quantization tool.
_QUANTIZATION_DEFAULTS: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": None,
    "group_size": None,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "lm_head": False,
    "dynamic": None,
}
_COMPRESSED_TENSORS = "compressed-tensors"
_COMPRESSED_FIELDS = ("quant_method", "format", "config_groups", "ignore", "kv_cache_scheme")
"""Quantization fields that affect the kernel of a compressed-tensors model. A missing field counts as null."""
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_VOCABULARY_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token")


def compatibility_fingerprint(folder: Path, template_kwargs: TemplateKwargs | None = None) -> str:
    """Return the SHA-256 of everything that an in-place reload cannot change, as `sha256:<hex>`.

    Args:
        folder: a model folder with config.json, weights and tokenizer.
        template_kwargs: arguments of the chat template, or None to use those stored in the folder.

    Raises:
        IntegrityError: a file is missing or damaged.
    """
    config = read_json_object(folder / "config.json")
    tokenizer_config = read_json_object(folder / "tokenizer_config.json", default={})
    tensors = read_headers(folder)
    parts: dict[str, Any] = {
        "config": _stable(config),
        "quantization": normal_quantization(_quantization(folder, config)),
        "tensors": [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors],
        "shared_embedding": _shared_embedding(folder, config, [tensor.name for tensor in tensors]),
        "tokenizer": _tokenizer(folder),
        "special_tokens": {key: _content(tokenizer_config.get(key)) for key in _SPECIAL_TOKENS},
        "chat_template": template.strip() if (template := read_chat_template(folder)) else None,
        "chat_template_kwargs": dict(read_template_kwargs(folder) if template_kwargs is None else template_kwargs),
        "generation": _stable(read_json_object(folder / "generation_config.json", default={})),
    }
    return _digest(parts)


def tokenizer_fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a model folder's tokenizer. Models that tokenize every text identically have equal hashes.

    Raises:
        IntegrityError: the tokenizer file is missing or damaged.
    """
    return _digest(_tokenizer(folder))


def _digest(parts: dict[str, Any]) -> str:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return f"sha256:{hashlib.sha256(text.encode('utf-8')).hexdigest()}"


def _tokenizer(folder: Path) -> dict[str, Any]:
    """Return the tokenizer content that determines the token ids of a text.

    This is tokenizer.json without its truncation and padding settings, which may be left over from when the tokenizer
    was last used. If a folder lacks that file, as with many SentencePiece models, the hashes of its vocabulary files
    are returned instead.
    """
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_json_object(folder / "tokenizer.json")
        return {key: value for key, value in tokenizer.items() if key not in ("truncation", "padding")}
    files = [folder / name for name in _VOCABULARY_FILES if (folder / name).is_file()]
    if not files:
        raise IntegrityError(f"{folder} has no tokenizer", expected=f"one of {', '.join(TOKENIZER_FILES)}")
    return {path.name: record_file(folder, path).sha256 for path in files}


def _shared_embedding(folder: Path, config: dict[str, Any], names: list[str]) -> str | None:
    """Return the SHA-256 of the embedding if the output layer shares it, or None if the output has its own
    matrix.

    The config may not show this, because some architectures share the embedding by default and then save no
    output layer.
    """
    text = config.get("text_config", config)
    if not text.get("tie_word_embeddings", config.get("tie_word_embeddings")) and any(
        name.endswith(_HEAD) for name in names
    ):
        return None
    embedding = next((name for name in names if name.endswith(_EMBEDDING)), None)
    return hash_tensor(folder, embedding) if embedding else None


def normal_quantization(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the quantization fields that affect the kernel, with defaults filled in, or None if the model is not
    quantized.
    """
    if config is None:
        return None
    if config.get("quant_method") == _COMPRESSED_TENSORS:
        return {key: config.get(key) for key in _COMPRESSED_FIELDS}
    normal = {key: config.get(key, default) for key, default in _QUANTIZATION_DEFAULTS.items()}
    normal["dynamic"] = normal["dynamic"] or None
    return normal


def _quantization(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise IntegrityError(
            f"{folder / 'config.json'}: quantization_config is {quantization!r:.80}", expected="a JSON object"
        )
    return quantization


def _stable(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _VOLATILE and not key.startswith("_")}


def _content(token: Any) -> Any:
    """Return the text of a special token. Tokenizer files store it either as a string or as an object with the text."""
    return token.get("content") if isinstance(token, dict) else token
