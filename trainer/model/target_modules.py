"""Which layers of a base model an adapter changes: three presets, found from the names of the model's own layers.

Architectures name and fuse their projections differently, so that a list that fits one says nothing to another: where
query, key and value are one layer, as Phi-3's `qkv_proj`, no preset can separate them, and each takes the whole. Knows
nothing of adapters or of what they cost.
"""

import re
from typing import TYPE_CHECKING

from svc.errors import RecipeError
from trainer.model.layer_shapes import linear_layers
from trainer.recipe.targets import Targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output head
_ATTENTION = re.compile(r"attn|attention")
# As a word of a layer's name: q_proj, query, qkv_proj, Wqkv, query_key_value, in_proj_qkv, kv_a_proj, c_attn.
_QUERY_OR_VALUE = re.compile(r"(?:^|_)(?:q|v|kv|w?qkv|query|value|attn)(?:_|$)")


def target_modules(model: "PreTrainedModel", preset: Targets) -> list[str] | str:
    """What PEFT takes as `target_modules`.

    Returns:
        Ends of layer names, sorted, as `q_proj`; with the module that they are in, as `attn.proj`, where a layer
        outside of attention ends so too. Of ALL_LINEAR PEFT's own word for it.

    Raises:
        RecipeError: no layer of the model's is what the preset asks for; names the layers that there are.
    """
    if preset is Targets.ALL_LINEAR:
        return ALL_LINEAR
    layers = set(linear_layers(model))
    chosen = {name for name in layers if _ATTENTION.search(name.rpartition(".")[0].lower())}
    if preset is Targets.ATTENTION_MIN:
        chosen = {name for name in chosen if _QUERY_OR_VALUE.search(_end(name).lower())}
    if not chosen:
        found = ", ".join(sorted({_end(name) for name in layers}))
        raise RecipeError(
            f"no layer of the base model is what targets {preset.value!r} asks for; its linear layers are "
            f"{found or 'none'}",
            expected="query and value projections" if preset is Targets.ATTENTION_MIN else "linear layers in attention",
            todo=f"take targets {Targets.ALL_LINEAR.value!r}",
        )
    elsewhere = {_end(name) for name in layers - chosen}
    return sorted({_end(name, 2 if _end(name) in elsewhere else 1) for name in chosen})


def _end(name: str, parts: int = 1) -> str:
    return ".".join(name.split(".")[-parts:])
