"""Checks that a quantized model has the weights of its source model, apart from rounding.

The weights are read from the files and compared layer by layer. To preserve a layer's outputs, GPTQ changes weights by
more than the rounding step. The allowed change is based on the measurements given below; rounding to nearest in 8 bits
changes weights by less. Imports torch.
"""

import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from svc.model_folder.weight_files import weight_files
from svc.version import Format
from trainer.evaluation.parity.awq import Tensors, read_unscaled

MAX_OFF = {Format.GPTQ: 0.45, Format.AWQ: 0.45, Format.INT8: 0.1, Format.FP8: 0.1}
"""Maximum ratio of the norm of a layer's change to the norm of its weights. Measured for GPTQ: 0.12 for tiny models,
0.24 for SmolLM2's worst layer with 32 samples and groups of 64. Scales that are wrong by 50% change a layer by 0.5.
Measured for AWQ: 0.11 for tiny models, 0.19 for SmolLM2's worst layer with 32 samples and groups of 32. Measured for
SmolLM2's worst layer in INT8: 0.012, in FP8: 0.026; a row in which one weight is far larger than the other weights
changes by more."""
_PACKED, _SCALES = ".qweight", ".weight_scale"
_ZERO_POINT = 8  # symmetric four bits
_IN_ONE_NUMBER = 8


@torch.no_grad()
def compare(format: Format, quantized: Path, merged: Path) -> tuple[float, str]:
    """Compare every quantized layer with the layer of the same name in the source model, one layer at a time.

    Args:
        format: the quantized format.
        quantized: folder of the quantized model.
        merged: folder of the source model.

    Returns:
        The largest ratio of the norm of a layer's change to the norm of its weights, and the name of that
        layer.
    """
    changes = []
    with ExitStack() as stack:
        before, after = (_open(folder, stack) for folder in (merged, quantized))
        for layer in sorted(_layer(name) for name in after if name.endswith((_PACKED, _SCALES))):
            weight = before[f"{layer}.weight"]().float()
            rounded = read_unscaled(before, after, layer) if format is Format.AWQ else _rounded(after, layer)
            off = float((rounded - weight).norm() / weight.norm())
            changes.append((math.inf if math.isnan(off) else off, layer))
    return max(changes)


def _layer(name: str) -> str:
    return name.removesuffix(_PACKED).removesuffix(_SCALES)


def _rounded(tensors: Tensors, layer: str) -> torch.Tensor:
    """Return a quantized layer's weights as float32 numbers, with shape [outputs, inputs]."""
    if f"{layer}{_SCALES}" in tensors:
        return tensors[f"{layer}.weight"]().float() * tensors[f"{layer}{_SCALES}"]()
    groups = tensors[f"{layer}.g_idx"]() if f"{layer}.g_idx" in tensors else None
    return expand(tensors[f"{layer}{_PACKED}"](), tensors[f"{layer}.scales"](), groups)


def _open(folder: Path, stack: ExitStack) -> Tensors:
    """Return a reader for each tensor in a folder, keyed by the tensor's name."""
    files = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(folder)]
    return {name: partial(file.get_tensor, name) for file in files for name in file.keys()}  # noqa: SIM118 - no mapping


def expand(packed: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
    """Unpack a quantized layer's weights to float32, with shape [outputs, inputs].

    Args:
        packed: int32 of shape [inputs / 8, outputs]. Each number packs eight inputs, the first in its lowest
            bits.
        scales: [groups, outputs].
        groups: the group of each input, or None for consecutive groups.
    """
    shifts = torch.arange(0, 4 * _IN_ONE_NUMBER, 4, dtype=torch.int32)
    numbers = (packed[:, None, :] >> shifts[None, :, None]) & 15
    inputs = numbers.reshape(-1, packed.shape[1])
    if groups is None:
        groups = torch.arange(len(inputs)) // (len(inputs) // len(scales))
    return ((inputs - _ZERO_POINT).float() * scales.float()[groups.long()]).T
