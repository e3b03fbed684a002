"""Finds the layers of a base model that an adapter changes, from a preset or from names in the recipe.

Architectures name and fuse their projections differently, so a list of layers for one architecture does not fit
another. If query, key and value are fused into one layer, as in Phi-3's `qkv_proj`, no preset can separate them, and
each preset includes the complete layer. This module is independent of adapters and their cost.
"""

import re
from typing import TYPE_CHECKING

from svc.errors import RecipeError
from trainer.model.layer_shapes import linear_layers
from trainer.recipe.targets import TargetChoice, Targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"  # PEFT's name for all linear layers except the output head
_ATTENTION = re.compile(r"attn|attention")
# Part of a layer's name: q_proj, query, qkv_proj, Wqkv, query_key_value, in_proj_qkv, kv_a_proj, c_attn.
_QUERY_OR_VALUE = re.compile(r"(?:^|_)(?:q|v|kv|w?qkv|query|value|attn)(?:_|$)")


def target_modules(model: "PreTrainedModel", chosen: TargetChoice) -> list[str] | str:
    """Return the value for PEFT's `target_modules`.

    Returns:
        Sorted layer name suffixes, such as `q_proj`. A suffix includes the module, as in `attn.proj`, if the suffix
        would otherwise also match a layer outside attention. For ALL_LINEAR, PEFT's own keyword is returned.

    Raises:
        RecipeError: the model has no layer that matches the preset or one of the names; the message names the layers
            that the model has.
    """
    if chosen is Targets.ALL_LINEAR:
        return ALL_LINEAR
    layers = set(linear_layers(model))
    if not isinstance(chosen, Targets):
        if missing := [end for end in chosen if not any(f".{name}".endswith(f".{end}") for name in layers)]:
            raise _no_layer(f"[{', '.join(missing)}]", layers, expected="names of linear layers except the output head")
        return sorted(set(chosen))
    matching = {name for name in layers if _ATTENTION.search(name.rpartition(".")[0].lower())}
    if chosen is Targets.ATTENTION_MIN:
        matching = {name for name in matching if _QUERY_OR_VALUE.search(_end(name).lower())}
    if not matching:
        expected = "query and value projections" if chosen is Targets.ATTENTION_MIN else "linear layers in attention"
        raise _no_layer(chosen.value, layers, expected=expected)
    elsewhere = {_end(name) for name in layers - matching}
    return sorted({_end(name, 2 if _end(name) in elsewhere else 1) for name in matching})


def target_layers(model: "PreTrainedModel", chosen: TargetChoice) -> list[str]:
    """Return the names of the linear layers that an adapter changes.

    Raises:
        RecipeError: see `target_modules`.
    """
    layers, ends = list(linear_layers(model)), target_modules(model, chosen)
    if ends == ALL_LINEAR:
        return layers
    return [name for name in layers if any(name.endswith(f".{end}") for end in ends)]


def _no_layer(chosen: str, layers: set[str], *, expected: str) -> RecipeError:
    names = ", ".join(sorted({_end(name) for name in layers}))
    return RecipeError(
        f"the base model has no layers that match adapter.targets: {chosen}; its linear layers are {names or 'none'}",
        expected=expected,
        todo=f"set adapter.targets to {Targets.ALL_LINEAR.value!r}",
    )


def _end(name: str, parts: int = 1) -> str:
    return ".".join(name.split(".")[-parts:])
