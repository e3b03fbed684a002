"""Resolves the base model that a recipe names, which may be a registered version.

If the recipe adds tokens or scales the rotary embedding, a changed copy of the base is written, so that all later
stages, including the engine, see an ordinary base with these tokens or this context.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.errors import BaseModelError, RecipeError
from svc.model_folder.weight_files import TOKENIZER_FILES, WEIGHTS_INDEX, weight_files
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.terminal import console, waiting
from svc.version import Format, VersionId
from trainer.base_model.cached_folder import build_once, changed_folder
from trainer.base_model.checks import check_chat_template, has_chat_template, read_json
from trainer.base_model.content import CONFIG_FILE, SHIPPED_FILES
from trainer.base_model.other_template import folder_with_template, revision_with_template
from trainer.base_model.resolve import Base, resolve_base, resolve_config
from trainer.data.template_choice import template_text
from trainer.model.config import load_config
from trainer.recipe.named_template import NamedTemplate
from trainer.recipe.rope import RopeScaling, RopeType

_OWN_POSITIONS = RopeScaling()


if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
"""Suffixes of the names of the weight matrices that have one row per token."""
_NOT_OF_TOKENIZER = ("generation_config.json", "chat_template.json")
"""Files in `SHIPPED_FILES` that are linked from the base's folder, because saving the tokenizer does not write them."""
_KEPT = ("rope_theta", "partial_rotary_factor")
"""Keys of the base's rotary embedding config that are kept, because they are not part of the scaling."""
_TOKENIZER_CONFIG = "tokenizer_config.json"


def revision_with_rope(revision: str, scaling: RopeScaling) -> str:
    """Return the revision of a base with scaled position embeddings: the base's revision plus the type and factor of
    the scaling.
    """
    return f"{revision}+rope:{scaling.type}:{scaling.factor:g}"


def folder_with_rope(folder: Path, scaling: RopeScaling, cache: Path) -> Path:
    """Return a cache folder that links to a model's files, with a config that scales its rotary position embeddings.

    The maximum length in the new config is the base's maximum length times the factor. vLLM expects this for YaRN; for
    other types, vLLM treats the value as an upper limit.

    Args:
        scaling: the new scaling, with a type and a factor.
        cache: folder for converted models; any number of processes may share it.

    Raises:
        BaseModelError: the base has no rotary embeddings, or has its own scaling, which `scaling` does not replace.
    """
    own, context = _own_rope(folder, scaling)
    content = read_json(folder / CONFIG_FILE)
    longer = int(context * (scaling.factor or 1))
    rope: dict[str, Any] = {"rope_type": str(scaling.type), "factor": scaling.factor}
    if scaling.type is RopeType.YARN:
        rope["original_max_position_embeddings"] = context
    text = content["text_config"] if isinstance(content.get("text_config"), dict) else content
    text.pop("rope_scaling", None)
    text["max_position_embeddings"] = longer
    if "rope_parameters" in text:
        text["rope_parameters"] = {key: own[key] for key in _KEPT if key in own} | rope
    else:
        text["rope_scaling"] = rope
    texts = {CONFIG_FILE: _json(content)}
    if (folder / _TOKENIZER_CONFIG).is_file():
        tokenizer = read_json(folder / _TOKENIZER_CONFIG)
        if isinstance(length := tokenizer.get("model_max_length"), int) and length < longer:
            texts[_TOKENIZER_CONFIG] = _json(tokenizer | {"model_max_length": longer})
    return changed_folder(folder, texts, cache / "longer_contexts")


def _own_rope(folder: Path, scaling: RopeScaling) -> tuple[dict[str, Any], int]:
    """Return the base's own rotary embedding config, and the context length before any scaling."""
    config = load_config(folder).get_text_config()
    own = getattr(config, "rope_parameters", None) or {}
    context = getattr(config, "max_position_embeddings", None)
    if "rope_theta" not in own or not context:  # none, or different ones for each kind of layer
        raise BaseModelError(
            f"RoPE scaling cannot be applied to {folder}: its config has "
            + (
                "different rotary position embeddings for each kind of layer"
                if own
                else "no rotary position embeddings"
            ),
            expected="one kind of rotary position embeddings in all layers",
            todo="remove rope_scaling from the recipe, or choose another base",
        )
    kind = own.get("rope_type", "default")
    if kind != "default" and not scaling.replace:
        raise BaseModelError(
            f"{folder} already uses RoPE scaling: {kind} with factor {own.get('factor')}",
            expected="a base without RoPE scaling, unless rope_scaling.replace is true",
            todo="remove rope_scaling from the recipe, or set rope_scaling.replace to true",
        )
    return dict(own), int(own.get("original_max_position_embeddings") or context)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


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


def find_base(
    name: str,
    settings: Settings,
    template: NamedTemplate | Path | None = None,
    scaling: RopeScaling = _OWN_POSITIONS,
    tokens: Sequence[str] = (),
) -> Base:
    """Return the base model that a recipe names. It is either a version's merged weights or a base found by
    `resolve_base`.

    Args:
        template: chat template to use in place of the base's own, or None to keep the base's own.
        scaling: scaling of the rotary position embeddings; a type of None keeps the base's own.
        tokens: new tokens to add to the base.

    Raises:
        BaseModelError: the base does not exist or has no chat template, or the given template, scaling or tokens cannot
            be used.
        NotFoundError: the version does not exist.
    """
    base = _find(name, settings)
    if template is not None:
        if has_chat_template(base.folder):
            console.print(
                f"  the chat template {template} replaces the base's own template", markup=False, soft_wrap=True
            )
        text = template_text(template, base.folder)
        folder = folder_with_template(base.folder, text, settings.base_cache)
        base = replace(base, folder=folder, revision=revision_with_template(base.revision, text))
    check_chat_template(base.folder)
    if scaling.type is not None:
        folder = folder_with_rope(base.folder, scaling, settings.base_cache)
        base = replace(base, folder=folder, revision=revision_with_rope(base.revision, scaling))
    if tokens:
        folder = folder_with_tokens(base.folder, tokens, settings.base_cache)
        base = replace(base, folder=folder, revision=revision_with_tokens(base.revision, tokens))
    return base


def _find(name: str, settings: Settings) -> Base:
    if "@" not in name or Path(name).exists():
        return resolve_base(name, settings.base_cache)
    version = VersionId.parse(name)
    registry = Registry.of(settings)
    manifest = registry.manifest(version)
    registry.verify(version, Format.MERGED)
    folder = registry.artifact(version, Format.MERGED)
    return Base(folder, name, manifest.base.licence, merged_revision(manifest))


def find_config(
    name: str,
    settings: Settings,
    template: NamedTemplate | Path | None = None,
    scaling: RopeScaling = _OWN_POSITIONS,
    tokens: Sequence[str] = (),
) -> Path:
    """Return a folder that contains the base model's config.json, without fetching or reading any weights.

    Args:
        template: chat template to use in place of the base's own, if the folder has a tokenizer, or None to
            keep the base's own.
        scaling: scaling of the rotary position embeddings; a type of None keeps the base's own.
        tokens: new tokens to add to the base.

    Raises:
        BaseModelError: the base does not exist, or the given template, scaling or tokens cannot be used.
        NotFoundError: the version does not exist.
    """
    if "@" in name and not Path(name).exists():
        folder = Registry.of(settings).artifact(VersionId.parse(name), Format.MERGED)
    else:
        folder = resolve_config(name, settings.base_cache)
    tokenizes = any((folder / file).is_file() for file in TOKENIZER_FILES)
    if template is not None and tokenizes:
        folder = folder_with_template(folder, template_text(template, folder), settings.base_cache)
    if scaling.type is not None:
        folder = folder_with_rope(folder, scaling, settings.base_cache)
    return folder_with_tokens(folder, tokens, settings.base_cache) if tokens and tokenizes else folder


def merged_revision(manifest: Manifest) -> str:
    """Return the digest (`sha256:<hex>`) of a version's merged model. The digest identifies the merged model when it is
    the base of another version.
    """
    return format_revision(manifest, Format.MERGED)


def format_revision(manifest: Manifest, format: Format) -> str:
    """Return the digest (`sha256:<hex>`) of a version's files in the given format."""
    hashes = " ".join(file.sha256 for file in manifest.formats[format].files)
    return f"sha256:{hashlib.sha256(hashes.encode()).hexdigest()}"
