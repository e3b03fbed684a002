"""Whether a quantized model's weights are those of the model that was quantized, but for the rounding to four bits.

Layer by layer, from the files. GPTQ moves weights beyond their own rounding, so that their layer's answers stay; how
much that may be follows from measurement and is stated below. Imports torch.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from svc.model_folder import weight_files

MOST_OFF = 0.45
"""Length of a layer's change as a share of its weights'. Measured: 0.12 of tiny models, 0.24 of SmolLM2's worst layer
with 32 samples and groups of 64. Scales that are off by half change a layer by 0.5."""
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
def compare(gptq: Path, merged: Path) -> Rounded:
    """Compares every quantized layer, one after the other, by the names that the files have.

    Args:
        gptq: folder of the quantized model.
        merged: folder of the model that was quantized.
    """
    found = []
    with ExitStack() as stack:
        before, after = (_open(folder, stack) for folder in (merged, gptq))
        for name in sorted(after):
            layer, dot, part = name.rpartition(".")
            if dot and part == "qweight":
                packed, scales = (_tensor(after, f"{layer}.{one}") for one in (part, "scales"))
                groups = _tensor(after, f"{layer}.g_idx") if f"{layer}.g_idx" in after else None
                weight = _tensor(before, f"{layer}.weight").float()
                off = float((expand(packed, scales, groups) - weight).norm() / weight.norm())
                found.append((math.inf if math.isnan(off) else off, layer))
    return Rounded(*max(found))


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The file that holds each tensor of a folder, by the tensor's name."""
    files = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(folder)]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118 - the object is no mapping


def _tensor(files: Mapping[str, Any], name: str) -> torch.Tensor:
    tensor: torch.Tensor = files[name].get_tensor(name)
    return tensor


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
