"""Resolves which layers of a base model an adapter changes: one of three presets, applied to the names of
the model's layers.

Architectures name and fuse their projections differently, so a list of layers for one does not fit
another. If query, key and value are one layer, as in Phi-3's `qkv_proj`, no preset can separate them,
and each preset includes the complete layer. This module is independent of adapters and their cost.
"""

import re
from typing import TYPE_CHECKING

from svc.errors import RecipeError
from trainer.model.layer_shapes import linear_layers
from trainer.recipe.targets import Targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"  # PEFT's name for all linear layers except the output head
_ATTENTION = re.compile(r"attn|attention")
# Part of a layer's name: q_proj, query, qkv_proj, Wqkv, query_key_value, in_proj_qkv, kv_a_proj, c_attn.
_QUERY_OR_VALUE = re.compile(r"(?:^|_)(?:q|v|kv|w?qkv|query|value|attn)(?:_|$)")


def target_modules(model: "PreTrainedModel", preset: Targets) -> list[str] | str:
    """Return the value for PEFT's `target_modules`.

    Returns:
        Sorted layer name suffixes, such as `q_proj`. A suffix includes the module, as in `attn.proj`, if a
        layer outside of attention would otherwise match it too. For ALL_LINEAR, PEFT's own keyword is
        returned.

    Raises:
        RecipeError: the model has no layer that matches the preset; the message names the layers it has.
    """
    if preset is Targets.ALL_LINEAR:
        return ALL_LINEAR
    layers = set(linear_layers(model))
    chosen = {name for name in layers if _ATTENTION.search(name.rpartition(".")[0].lower())}
    if preset is Targets.ATTENTION_MIN:
        chosen = {name for name in chosen if _QUERY_OR_VALUE.search(_end(name).lower())}
    if not chosen:
        names = ", ".join(sorted({_end(name) for name in layers}))
        raise RecipeError(
            f"the base model has no layers that match adapter.targets: {preset.value}; its linear layers are "
            f"{names or 'none'}",
            expected="query and value projections" if preset is Targets.ATTENTION_MIN else "linear layers in attention",
            todo=f"set adapter.targets to {Targets.ALL_LINEAR.value!r}",
        )
    elsewhere = {_end(name) for name in layers - chosen}
    return sorted({_end(name, 2 if _end(name) in elsewhere else 1) for name in chosen})


def _end(name: str, parts: int = 1) -> str:
    return ".".join(name.split(".")[-parts:])
