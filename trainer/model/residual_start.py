"""Initializes an adapter from a part of the base's weights, as PiSSA and OLoRA do, and saves the result as plain LoRA.

The base's weights are split into W = R + s B0 A0. Training updates B and A and freezes the residual R, so the adapter
fits only R, which is not stored anywhere. Because R + s B A = W + s (B A - B0 A0), the trained change is also a plain
LoRA of twice the rank, which fits the original base. The initial matrices B0 and A0 are part of each checkpoint,
because another machine may compute them with different signs or in a different order.

PEFT also implements these initializations and a conversion. PEFT's initialization cannot continue from stored matrices.
PEFT's conversion adds two products of large matrices that almost cancel out, so an engine that rounds the matrices to
bf16 loses much of a small change. Imports torch and PEFT.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.recipe.adapter import OLORA, pissa_iterations

Matrices = dict[str, Tensor]
"""The initial `A` and `B` matrices of each adapted layer, in float32 in main memory, keyed by parameter name."""

_ADAPTER = "default"


@torch.no_grad()
def first_matrices(model: PeftModel, start: str, seed: int) -> Matrices:
    """Return the adapter's initial matrices. The base is not changed.

    Args:
        start: value of `adapter.init`. The adapter's rank must not exceed either dimension of any
            layer's weight.
        seed: random seed for an approximate decomposition. Nothing else uses random numbers.
    """
    matrices: Matrices = {}
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, layer in _layers(model):
            rank, weight = layer.r[_ADAPTER], _weight(layer)
            first, second = _factors(weight.to(device, torch.float32), rank, layer.scaling[_ADAPTER], start)
            matrices |= zip(_names(name), (first, second), strict=True)
    return {name: matrix.cpu().contiguous() for name, matrix in matrices.items()}


def _factors(weight: Tensor, rank: int, scale: float, start: str) -> tuple[Tensor, Tensor]:
    """Return a layer's A and B, computed from the largest singular values of its weight, or from the first columns of
    its QR decomposition.
    """
    if start == OLORA:
        columns, rows = torch.linalg.qr(weight)
        return rows[:rank], columns[:, :rank]
    if iterations := pissa_iterations(start):
        left, values, right = torch.svd_lowrank(weight, rank, niter=iterations)
        right = right.T
    else:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


@torch.no_grad()
def start_from(model: PeftModel, matrices: Matrices) -> None:
    """Set the adapter's initial matrices, and subtract their product from the base's weights.

    Weights are replaced, not overwritten, because several models may share their memory.
    """
    for name, layer in _layers(model):
        first, second = (matrices[each] for each in _names(name))
        layer.lora_A[_ADAPTER].weight.copy_(first)
        layer.lora_B[_ADAPTER].weight.copy_(second)
        base = _weight(layer)
        part = layer.scaling[_ADAPTER] * (second @ first).to(base.device)
        base.data = (base.float() - part).to(base.dtype)


def save_as_lora(adapter: Path, matrices: Matrices) -> None:
    """Convert a saved adapter, which is valid only for the residual R (see the module docstring), into a plain LoRA of
    the original base.

    B A - B0 A0 = (B - B0) A + B0 (A - A0), so both products are about as small as the trained change.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        matrices: the adapter's initial matrices.
    """
    path, converted = adapter / SAFETENSORS_WEIGHTS_NAME, {}
    for name, trained in load_file(path).items():
        if ".lora_" not in name:  # rows of new tokens
            converted[name] = trained
            continue
        first = matrices[name.removesuffix(".weight") + f".{_ADAPTER}.weight"]
        if ".lora_A." in name:
            converted[name] = torch.cat([trained, trained - first], dim=0)
        else:
            converted[name] = torch.cat([trained - first, first], dim=1)
    save_file(converted, path, {"format": "pt"})
    config = json.loads((adapter / CONFIG_NAME).read_text("utf-8"))
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    (adapter / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _layers(model: PeftModel) -> Iterator[tuple[str, Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            yield name, module


def _weight(layer: Linear) -> nn.Parameter:
    return cast(nn.Linear, layer.get_base_layer()).weight


def _names(layer: str) -> tuple[str, str]:
    """Return the parameter names of a layer's A and B."""
    return f"{layer}.lora_A.{_ADAPTER}.weight", f"{layer}.lora_B.{_ADAPTER}.weight"
