"""Checks that a merged model equals its base plus the adapter, applied exactly once and with the recipe's
scale.

Each written weight must be one of the two bf16 neighbors of the sum, and its change from the base is compared with the
adapter's update. Imports torch.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer

from trainer.export.verify_merge import adapted_tensors
from trainer.model.rounding import neighbours
from trainer.recipe.adapter import AdapterType
from trainer.recipe.recipe import Recipe

_ROUNDED_SUM, _ROUNDED_BASE = 1.0, 0.5
"""Allowed deviations of a merged weight due to rounding, in bf16 steps. The sum of base and adapter may be rounded up
or down, so it may be off by one step. The weights of a base published in another data type, such as Llama 2 in float16,
are first rounded to the nearest bf16 number, which may add half a step."""
_ONCE = 0.02
"""Allowed deviation from 1 of the factor by which an adapter's update was multiplied when it was merged. A factor of 1
means that the adapter was applied exactly once. Rounding changes the factor by less than 0.01 for a trained adapter."""
_SIGMAS = 5.0
"""Additional allowed deviation of the factor described at `_ONCE`, in standard deviations of the factor's random error.
Small updates cause this error, because they are rounded up or down as if at random. About one correctly merged module
in two million exceeds this limit."""


@dataclass(frozen=True, slots=True)
class Applied:
    """Result of comparing merged weights with base plus adapter.

    Attributes:
        lowest, highest: smallest and largest factor, over all modules, by which the adapter's update was
            multiplied when it was merged; 1 if it was added exactly once.
        wrong: a module whose factor differs from 1 by more than rounding explains, or None if there is none.
        off: largest share of a module's weights that differ from the sum by more than rounding explains.
        module: the module in which `off` was found.
    """

    lowest: float
    highest: float
    wrong: str | None
    off: float
    module: str


@torch.no_grad()
def compare(model: PeftModel, merged: Mapping[str, torch.Tensor]) -> Applied:
    """Compare the merged weights with base plus adapter.

    Args:
        model: the base with the unmerged adapter. The base's weights may have any data type that can
            represent all bf16 numbers.
        merged: the merged weights, keyed by parameter name.
    """
    times, wrong, off = [], [], [(0.0, "")]
    for name, base, change in _changes(model):
        written = merged[name].to(base.device).float()
        total = base + change
        lower, upper = neighbours(total)
        step, base_step = (upper - lower).abs(), _step(base)
        allowed = _ROUNDED_SUM * step + _ROUNDED_BASE * torch.maximum(step, base_step)
        off.append((float(((written - total).abs() > allowed).float().mean()), name))
        if (size := float(change.square().sum())) > 0:
            times.append(float((change * (written - base)).sum()) / size)
            above = (total - lower).abs()  # rounded up with the probability above / step
            variance = above * (step - above) + base_step.square() / 12  # the second term if the base was rounded
            if abs(times[-1] - 1) > _ONCE + _SIGMAS * float((change.square() * variance).sum()) ** 0.5 / size:
                wrong.append(name)
    return Applied(min(times, default=0.0), max(times, default=0.0), min(wrong, default=None), *max(off))


def _step(weights: torch.Tensor) -> torch.Tensor:
    """Return the distance between each weight's two bf16 neighbors."""
    lower, upper = neighbours(weights)
    return (upper - lower).abs()


def _changes(model: PeftModel) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield each adapted tensor's name, its base weights, and the change that the adapter makes to them."""
    base_model = model.get_base_model()
    for name, tensor in adapted_tensors(model).items():
        layer: Any = base_model.get_submodule(name)
        adapter = layer.active_adapters[0]
        if isinstance(layer, ParamWrapper):  # experts, which are one parameter
            yield tensor, *_change_of_experts(layer, adapter)
            continue
        change = layer.get_delta_weight(adapter).float()
        base = layer.get_base_layer().weight.float()
        magnitude: Any = getattr(layer, "lora_magnitude_vector", None)
        if magnitude:  # DoRA: a direction, and a length per output (Liu et al. 2024, eq. 5)
            direction = base + change
            length = direction.norm(dim=1, keepdim=True)
            change = magnitude[adapter].weight.float()[:, None] / length * direction - base
        yield f"{tensor}.weight", base, change
    for name, module in base_model.named_modules():
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
            rows = module.get_base_layer().weight.float()
            trained = module.get_merged_weights(module.active_adapters).float()
            yield f"{name.removesuffix('.token_adapter')}.weight", rows, trained - rows


def _change_of_experts(layer: ParamWrapper, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts' base weights and the adapter's change to them, in float32. PEFT would otherwise round
    the change to bf16.
    """
    parameter = layer.get_param()
    stored, parameter.data = parameter.data, parameter.data.float()
    try:
        return parameter.data, layer.get_delta_weight(adapter)
    finally:
        parameter.data = stored


def scale_of(adapter: Path, recipe: Recipe) -> tuple[float, float] | None:
    """Return the scale of an adapter's update as given by the adapter's config, and as given by the recipe. Return None
    for VeRA.
    """
    if recipe.adapter_type is AdapterType.VERA:
        return None
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    if recipe.adapter_type is AdapterType.ADALORA:  # each layer divides it by its final rank
        return config["lora_alpha"], recipe.alpha
    rooted = bool(config.get("use_rslora"))
    written = config["lora_alpha"] / (config["r"] ** 0.5 if rooted else config["r"])
    return written, recipe.alpha / (recipe.rank**0.5 if recipe.adapter.rslora else recipe.rank)
