"""Scales a base model's rotary position embeddings. The result is a new folder that links to the base's other files.

All later stages, including the engine, see an ordinary base with a longer context.
"""

import json
from pathlib import Path
from typing import Any

from svc.errors import BaseModelError
from trainer.base_model.cached_folder import changed_folder
from trainer.base_model.checks import read_json
from trainer.base_model.content import CONFIG_FILE
from trainer.model.config import load_config
from trainer.recipe.rope import RopeScaling, RopeType

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
