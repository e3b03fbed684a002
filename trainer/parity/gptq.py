"""Whether a quantized model's weights are those of the model that was quantized, but for the rounding to four bits.

Layer by layer, from the files. GPTQ moves weights beyond their own rounding, so that their layer's answers stay; how
much that may be follows from measurement and is stated below. Imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

MOST_OFF = 0.35
"""Length of a layer's change as a share of its weights'. Measured: at most 0.16 over models, group sizes and layers;
scales that are off by half change it by 0.5."""
_ZERO_POINT = 8  # symmetric four bits
_IN_ONE_NUMBER = 8


@dataclass(frozen=True, slots=True)
class Rounded:
    """How far a quantized layer is from what it was.

    Attributes:
        off: length of the change as a share of the weights', in the layer where it is largest.
        layer: that one.
    """

    off: float
    layer: str


@torch.no_grad()
def compare(gptq: Path, merged: Mapping[str, torch.Tensor]) -> Rounded:
    """Compares every quantized layer.

    Args:
        gptq: folder of the quantized model.
        merged: tensors of the model that was quantized, by parameter name.
    """
    found = []
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(gptq.glob("*.safetensors")):
        tensors |= load_file(path)
    for name in sorted(tensors):
        layer, dot, part = name.rpartition(".")
        if dot and part == "qweight":
            weight = merged[f"{layer}.weight"].float()
            change = expand(tensors[name], tensors[f"{layer}.scales"], tensors.get(f"{layer}.g_idx")) - weight
            off = float(change.norm() / weight.norm())
            found.append((off if off == off else float("inf"), layer))
    return Rounded(*max(found))


def expand(packed: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
    """The weights of a layer, [outputs, inputs], in float32.

    Args:
        packed: [inputs / 8, outputs], int32: eight inputs in a number, the first in its lowest bits.
        scales: [groups, outputs].
        groups: the group of each input; None: they follow each other.
    """
    shifts = torch.arange(0, 4 * _IN_ONE_NUMBER, 4, dtype=torch.int32)
    numbers = (packed[:, None, :] >> shifts[None, :, None]) & 15
    inputs = numbers.reshape(-1, packed.shape[1])
    if groups is None:
        groups = torch.arange(len(inputs)) // (len(inputs) // len(scales))
    return ((inputs - _ZERO_POINT).float() * scales.float()[groups.long()]).T
