"""Whether a merged model holds its base plus the adapter, once, with the scale that the recipe says.

Weight by weight: what was written is compared with the sum, which must be met but for the rounding of bf16. Imports
torch.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper

from trainer.export.verify_merge import adapted_tensors
from trainer.recipe.sections import AdapterType, Recipe

_ROUNDING = 2.0**-8
"""Of bf16, whose fraction has eight bits with the hidden one: a sum that is rounded to it is off by half of that share
at most, and sums that differ in their last bit before may round to neighbours."""


@dataclass(frozen=True, slots=True)
class Applied:
    """How often an adapter is in the merged weights.

    Attributes:
        lowest, highest: of its modules: 1 where the change is the adapter's, 2 where it was added twice.
        off: share of weights that are not the sum, in the module where it is largest.
        module: that module.
    """

    lowest: float
    highest: float
    off: float
    module: str


@torch.no_grad()
def compare(model: PeftModel, merged: Mapping[str, torch.Tensor]) -> Applied:
    """Compares the merged weights with base plus adapter.

    Args:
        model: the base with the adapter beside it; weights of the base in any number type that holds bf16.
        merged: tensors by parameter name.
    """
    times, off = [], [(0.0, "")]
    for name, base, change in _changes(model):
        written = merged[name].to(base.device).float()
        total = base + change
        off.append((float(((written - total).abs() > _ROUNDING * total.abs() + 1e-30).float().mean()), name))
        wanted = total.to(torch.bfloat16).float() - base
        if (size := float((wanted * wanted).sum())) > 0:
            times.append(float((wanted * (written - base)).sum()) / size)
    worst = max(off)
    return Applied(min(times, default=0.0), max(times, default=0.0), *worst)


def _changes(model: PeftModel) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each adapted tensor's name, the base's weights, and what the adapter adds to them."""
    whole = model.get_base_model()
    for name, tensor in adapted_tensors(model).items():
        layer: Any = whole.get_submodule(name)
        adapter = layer.active_adapters[0]
        change = layer.get_delta_weight(adapter).float()
        if isinstance(layer, ParamWrapper):  # of experts, which are one parameter
            yield tensor, layer.get_param().float(), change
            continue
        base = layer.get_base_layer().weight.float()
        magnitude: Any = getattr(layer, "lora_magnitude_vector", None)
        if magnitude:  # DoRA: a direction, and its length for each output (Liu et al. 2024, eq. 5)
            direction = base + change
            length = direction.norm(dim=1, keepdim=True)
            change = magnitude[adapter].weight.float()[:, None] / length * direction - base
        yield f"{tensor}.weight", base, change


def scale_of(adapter: Path, recipe: Recipe) -> tuple[float, float] | None:
    """By what an adapter's update is multiplied, as its config says and as the recipe does; None of VeRA."""
    if recipe.adapter_type is AdapterType.VERA:
        return None
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    if recipe.adapter_type is AdapterType.ADALORA:  # each layer's is divided by the rank that it has in the end
        return config["lora_alpha"], recipe.alpha
    rooted = bool(config.get("use_rslora"))
    said = config["lora_alpha"] / (config["r"] ** 0.5 if rooted else config["r"])
    return said, recipe.alpha / (recipe.rank**0.5 if recipe.adapter.rslora else recipe.rank)
