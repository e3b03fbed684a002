"""Checks that a quantized model has the weights of its source model, apart from rounding to four bits.

The weights are read from the files and compared layer by layer. GPTQ moves weights by more than their
own rounding to preserve the layer's outputs. The allowed change is based on the measurements given
below. Imports torch.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from svc.model_folder.weight_files import weight_files

MAX_OFF = 0.45
"""Maximum ratio of the norm of a layer's change to the norm of its weights. Measured: 0.12 for tiny models,
0.24 for SmolLM2's worst layer with 32 samples and groups of 64. Scales that are off by half change a
layer by 0.5."""
_PACKED = ".qweight"
_ZERO_POINT = 8  # symmetric four bits
_IN_ONE_NUMBER = 8


@torch.no_grad()
def compare(gptq: Path, merged: Path) -> tuple[float, str]:
    """Compare every quantized layer with the layer of the same name in the source model, one layer at a time.

    Args:
        gptq: folder of the quantized model.
        merged: folder of the source model.

    Returns:
        The largest ratio of the norm of a layer's change to the norm of its weights, and the name of that
        layer.
    """
    changes = []
    with ExitStack() as stack:
        before, after = (_open(folder, stack) for folder in (merged, gptq))
        for layer in sorted(name.removesuffix(_PACKED) for name in after if name.endswith(_PACKED)):
            groups = after[f"{layer}.g_idx"]() if f"{layer}.g_idx" in after else None
            weight = before[f"{layer}.weight"]().float()
            rounded = expand(after[f"{layer}{_PACKED}"](), after[f"{layer}.scales"](), groups)
            off = float((rounded - weight).norm() / weight.norm())
            changes.append((math.inf if math.isnan(off) else off, layer))
    return max(changes)


def _open(folder: Path, stack: ExitStack) -> dict[str, Callable[[], torch.Tensor]]:
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
